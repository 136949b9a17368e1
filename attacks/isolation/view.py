"""A frozen evaluation view of a model that isolates the caller's model from attacks.

The view shares the storage of the parameters but never computes their gradients; it has its own buffers and train/eval
flags. It maps the estimators' ``[0, 1]`` to the model's pixel bounds, counts passes per image and can record the best
verified iterate that passes through it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from attacks.isolation.freezing import frozen
from attacks.isolation.outputs import as_logits, check_rows
from attacks.isolation.snapshot import Snapshot
from attacks.seeds import forked_generators, seed_generators
from attacks.trace import Record
from attacks.types import Bounds, Domain, EstimatorError, InputError, Norm, one_line

if TYPE_CHECKING:
    from attacks.trace import Trace


class WeightsError(EstimatorError):
    """An estimator changed the network's parameters; the change has been undone."""

    TEXT = "a change of the network's weights (undone)"


class Classifier(nn.Module):
    """The model that an estimator gets: pixels in ``[0, 1]`` -> logits ``(B, classes)``, with passes counted.

    Attributes:
        bounds: smallest and largest value of a witness in the estimator's units: ``(0, 1)``, or infinite in the free
            domain.
        domain: ``box`` or ``free``.
        classes: the number of outputs.
        batch_size: the most images per pass.
        forwards, backwards: ``(B,)`` float64 on the device, passes per image of the current chunk. Where a library
            hides which rows it passes, the rows of the pass are divided evenly over the chunk.
        trace: if set, receives every batch of the chunk and its logits.
        notes: the estimator's note on each image of the current chunk.
        basins: ``(B,)`` float64, see `Margins`; NaN where the estimator has not stated it.
        draws: number of forward passes that one pass averages over; see `attacks.measure.measure`, ``expect_over``.
        draw_seed: seed of the generators for each average.
        precision: the dtype of the network's own logits in the latest pass.
    """

    def __init__(self, network: nn.Module, pixel_bounds: Bounds, domain: Domain, device: torch.device) -> None:
        super().__init__()
        self.network = network
        self.pixel_bounds = pixel_bounds
        self.domain: Domain = domain
        self.bounds: Bounds = (0.0, 1.0) if domain == "box" else (-math.inf, math.inf)
        self.classes = 0
        self.batch_size = 128
        self.device = device
        self.binary, self.draws, self.draw_seed = False, 1, 0
        self.precision = torch.float32
        self.record: Record | None = None
        self.trace: Trace | None = None
        self._position = torch.empty(0, dtype=torch.int64)
        self.start_chunk(0)
        self.eval()
        self._kept = Snapshot(network)

    def settle(self) -> None:
        """Undo all changes of the network, which also judges the results and may be the caller's own.

        Raises:
            WeightsError: the attack changed the parameters.
        """
        self.training = False
        if self._kept.restore():
            raise WeightsError(WeightsError.TEXT)

    def start_chunk(self, size: int) -> None:
        """Begin a chunk of ``size`` images, with counts of 0."""
        self.forwards = torch.zeros(size, dtype=torch.float64, device=self.device)
        self.backwards = torch.zeros(size, dtype=torch.float64, device=self.device)
        self.active = torch.arange(size, device=self.device)
        self.trace = None
        self.notes = [""] * size
        self.basins = torch.full((size,), math.nan, dtype=torch.float64, device=self.device)

    def note(self, texts: Sequence[str]) -> None:
        """Set a note for each active row; it becomes the row's message if a witness is found."""
        for row, text in zip(self.active.tolist(), texts, strict=True):
            self.notes[row] = text

    def disagree(self, ratios: Tensor) -> None:
        """Set how far independent searches of each active row disagree ``(A,)``; see `Margins.basins`."""
        self.basins[self.active] = ratios.double()

    def charge(self, forwards: Tensor, backwards: Tensor) -> None:
        """Count passes of each active row ``(A,)`` through something else, such as a copy of the network."""
        self.forwards.index_add_(0, self.active, forwards)
        self.backwards.index_add_(0, self.active, backwards)

    @contextmanager
    def rows(self, index: Tensor) -> Iterator[None]:
        """Within the context, count passes for these rows ``(A,)`` of the currently active rows."""
        before = self.active
        self.active = before[index]
        try:
            yield
        finally:
            self.active = before

    @contextmanager
    def recording(self, images: Tensor, labels: Tensor, norm: Norm) -> Iterator[Record]:
        """Within the context, record the nearest verified iterate of each active row.

        Args:
            images, labels: ``(A, ...)`` and ``(A,)`` of the active rows.
        """
        before, outer = (self.record, self._position), self.active
        position = torch.empty(int(outer.max()) + 1, dtype=torch.int64, device=outer.device)
        position[outer] = torch.arange(len(outer), device=outer.device)
        self.record, self._position = Record(images, labels, norm, self.bounds), position
        try:
            yield self.record
        finally:
            self.record, self._position = before

    def to_pixels(self, images: Tensor) -> Tensor:
        """Map ``[0, 1]`` to the model's bounds; always a new tensor, since some models change their input in place."""
        low, high = self.pixel_bounds
        return images.clone() if (low, high) == (0.0, 1.0) else images * (high - low) + low

    def from_pixels(self, pixels: Tensor) -> Tensor:
        """Inverse of `to_pixels`."""
        low, high = self.pixel_bounds
        # with bounds rounded to the images' dtype, the outermost pixels would lie just outside 0 and 1
        return pixels.clone() if (low, high) == (0.0, 1.0) else ((pixels - low) / (high - low)).clamp(*self.bounds)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images in ``[0, 1]``, differentiable."""
        pixels = self.to_pixels(images)
        if pixels.requires_grad:
            # a channels_last model returns gradients in its own layout, which torchattacks' `view` does not accept
            pixels.register_hook(Tensor.contiguous)  # type: ignore[no-untyped-call]
        logits = self.logits(pixels)
        active = self.active
        self._count(self.forwards, active, len(images) * self.draws)
        if logits.requires_grad:
            logits.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: self._count(self.backwards, active, len(gradient) * self.draws)
            )
        if self.record is not None and len(images) == len(active):
            self.record.see(images.detach(), logits.detach(), self._position[active])
        if self.trace is not None:
            # mapped again, since the network may have changed its input in place
            self.trace.see(self.to_pixels(images.detach()), logits.detach(), active, self.forwards + self.backwards)
        return logits

    def logits(self, pixels: Tensor) -> Tensor:
        """Logits of images in the model's own bounds, differentiable and not counted.

        With ``draws`` > 1 they are the logarithms of the average softmax over that many copies of the image in one
        batch, with the generators seeded: a fixed function of the image, independent of the rest of the batch.
        """
        if self.draws == 1:
            return self.drawn(pixels)
        return torch.cat([self._averaged(image) for image in torch.split(pixels, 1)])

    def drawn(self, pixels: Tensor) -> Tensor:
        """Logits of a single pass of the network, at least in the precision of the pixels."""
        logits = as_logits(self.network(pixels), self.binary)
        if not isinstance(logits, Tensor) or not logits.is_floating_point():
            return logits  # type: ignore[no-any-return]  # `clean_logits` refuses it
        self.precision = logits.dtype
        if logits.dtype is pixels.dtype:
            return logits
        # estimators compute with logits and images together
        return logits.to(torch.promote_types(logits.dtype, pixels.dtype))

    def _averaged(self, image: Tensor) -> Tensor:
        # forked, so that the attack's own draws continue as if without this pass
        with forked_generators():
            seed_generators(self.draw_seed)
            logits = self.drawn(image.repeat(self.draws, *[1] * (image.ndim - 1)))
        check_rows(logits, self.draws, image.device, self.binary)
        return logits.log_softmax(1).logsumexp(0, keepdim=True) - math.log(self.draws)

    @torch.no_grad()
    def classify(self, pixels: Tensor) -> Tensor:
        """Logits of images in the model's own bounds: a fresh pass without gradients, ``batch_size`` at a time."""
        self._count(self.forwards, self.active, len(pixels) * self.draws)
        logits = self._in_batches(pixels)
        if self.trace is not None:
            self.trace.see(pixels, logits, self.active, self.forwards + self.backwards)
        return logits

    def _in_batches(self, pixels: Tensor) -> Tensor:
        try:
            parts: list[Tensor] = [self.logits(part.clone()) for part in torch.split(pixels, self.batch_size)]
            # an output that is not a tensor is returned as it is: `clean_logits` refuses it
            return torch.cat(parts) if len(parts) > 1 and isinstance(parts[0], Tensor) else parts[0]
        except torch.OutOfMemoryError as error:
            self.take_less(len(pixels), error)
        return self._in_batches(pixels)

    def take_less(self, count: int, error: torch.OutOfMemoryError) -> None:
        """Halve the batch size after running out of memory with ``count`` images.

        Raises:
            InputError: the batch was a single image.
        """
        size = min(self.batch_size, count)
        if size == 1:
            raise InputError(
                f"expected memory for a pass of one image, got {one_line(error, kind=False)}; use a device with more"
            ) from error
        self.batch_size = size // 2

    @staticmethod
    def _count(counts: Tensor, active: Tensor, size: int) -> None:
        if len(active):
            # an image may be active more than once; the counts stay on the device, to avoid waiting for it at each pass
            counts.index_add_(0, active, torch.full_like(active, size / len(active), dtype=counts.dtype))


@contextmanager
def frozen_view(model: nn.Module, pixel_bounds: Bounds, domain: Domain, device: torch.device) -> Iterator[Classifier]:
    """Yield a `Classifier` over ``model``; afterwards the caller's model is unchanged, also after an exception.

    Raises:
        InputError: a model without all of its weights (see `attacks.isolation.unwrapping.check_whole`).
    """
    with torch.inference_mode(False), torch.enable_grad(), _plain_numbers(device), frozen(model) as network:
        yield Classifier(network, pixel_bounds, domain, device)


@contextmanager
def _plain_numbers(device: torch.device) -> Iterator[None]:
    """Disable autocast, which would move witnesses, and set the default dtype to float32, for attacks' constants."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_default_dtype(before)
