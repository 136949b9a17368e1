"""How many images a pass may have, by what autograd keeps of one of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attacks.estimator import Estimator
from attacks.isolation import Classifier, frozen_view
from attacks.seeds import forked_generators
from attacks.types import Bounds, Domain

# What a pass with gradients may keep, in bytes. About half as much again passes through while it is built and taken
# back, and the images' own copies come on top: a process with a ResNet-50 on 224x224 pixels stays below 4 GB.
KEPT = 2**30
# Numbers in an image up to which nothing is asked: networks for 64x64 pixels in colour keep less in ordinary batches.
SMALL = 3 * 64 * 64

# Batches that an estimator which fills its batches up by itself gets at a time: more leave fewer half-empty ones.
REFILLED = 8


def chunk_size(view: Classifier, estimator: Estimator) -> int:
    """How many images the estimator gets at a time; an averaged network's draws are seeded for one."""
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
    """How many of these images `attacks.measure.measure` gives the estimator at a time.

    Measured apart, parts of so many images have the margins that all of them have together, to the bit: the same
    images stand in a batch, and attacks that draw from global generators draw the same. (On CUDA, only while memory
    lasts.)
    """
    with forked_generators(), frozen_view(model, bounds, domain, images.device) as view:
        view.draws = expect_over
        view.batch_size = affordable(view, images, batch_size)
        return chunk_size(view, estimator)


def affordable(view: Classifier, images: Tensor, most: int) -> int:
    """The largest batch of up to ``most`` images whose forward pass keeps no more than `KEPT`; at least 1.

    On the CPU, where nothing says in time that memory runs out. On CUDA `measure` halves batches when it does.

    Args:
        images: ``(N, C, H, W)``, in the model's bounds.
    """
    if images.device.type != "cpu" or not len(images) or images[0].numel() <= SMALL:
        return most
    try:
        kept = kept_bytes(view, images[:1]) * view.draws
    except Exception:  # of a model that cannot be measured, `measure` says what is wrong with it
        return most
    return max(min(most, KEPT // max(kept, 1)), 1)


def kept_bytes(view: Classifier, image: Tensor) -> int:
    """Bytes that autograd keeps of a forward pass of ``image`` ``(1, C, H, W)``, the network's own tensors apart."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*view.network.parameters(), *view.network.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    leaf = image.detach().clone().requires_grad_()
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = view.network(leaf)
        total = sum(kept.values())
        del logits
    return total
