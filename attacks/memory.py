"""Batch sizes that fit into memory, from what autograd saves for one image."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attacks.estimator import Estimator
from attacks.isolation import Classifier, frozen_view
from attacks.seeds import forked_generators
from attacks.types import Bounds, Domain

# Most bytes that autograd may save in a pass. About half as much again is needed temporarily in both passes, and the
# copies of the images come on top: a process with a ResNet-50 on 224x224 pixels stays below 4 GB.
KEPT = 2**30
# Images of at most this many numbers are not checked: networks for 64x64 colour images need less in ordinary batches.
SMALL = 3 * 64 * 64

# Number of batches given at a time to an estimator that refills its batches itself; more leave fewer half-empty ones.
REFILLED = 8


def chunk_size(view: Classifier, estimator: Estimator) -> int:
    """The number of images that the estimator gets at a time; 1 for averaged networks, seeded per image."""
    if view.draws > 1:
        return 1
    return view.batch_size * (REFILLED if getattr(estimator, "refills", False) else 1)


def chunk_length(
    model: nn.Module,
    images: Tensor,
    estimator: Estimator,
    *,
    domain: Domain,
    bounds: Bounds,
    batch_size: int,
    expect_over: int = 1,
) -> int:
    """The number of these images that `attacks.measure.measure` gives the estimator at a time.

    Measuring parts of this many images separately gives bit-equal margins: batches hold the same images, and attacks
    that draw from global generators draw the same numbers. (On CUDA, only as long as memory suffices.)
    """
    with forked_generators(), frozen_view(model, bounds, domain, images.device) as view:
        view.draws = expect_over
        view.batch_size = affordable(view, images, batch_size)
        return chunk_size(view, estimator)


def affordable(view: Classifier, images: Tensor, most: int) -> int:
    """The largest batch of up to ``most`` images for which autograd saves at most `KEPT` bytes; at least 1.

    Applies on the CPU, where running out of memory cannot be caught. On CUDA, `measure` halves batches when it happens.

    Args:
        images: ``(N, C, H, W)``, in the model's bounds.
    """
    if images.device.type != "cpu" or not len(images) or images[0].numel() <= SMALL:
        return most
    try:
        kept = kept_bytes(view, images[:1]) * view.draws
    except Exception:  # a model that cannot be measured, which `measure` refuses
        return most
    return max(min(most, KEPT // max(kept, 1)), 1)


def kept_bytes(view: Classifier, image: Tensor) -> int:
    """Bytes that autograd saves in a forward pass of ``image`` ``(1, C, H, W)``, without the network's own tensors."""
    network_storage = {
        tensor.untyped_storage().data_ptr() for tensor in (*view.network.parameters(), *view.network.buffers())
    }
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in network_storage:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    leaf = image.detach().clone().requires_grad_()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = view.network(leaf)
        total = sum(kept.values())
        del logits
    return total
