"""Measuring does not change the caller's model, images or generators; every pass is counted."""

import logging
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from attacks.adapters.foolbox import foolbox
from attacks.estimator import Margins, Settings, Status
from attacks.isolation import Classifier, frozen_view
from attacks.measure import measure
from attacks.registry import ESTIMATORS, WRAPPERS, create
from attacks.search.scale_free import ScaleFree
from attacks.seeds import forked_generators
from attacks.trace import Record
from attacks.types import Domain, EstimatorError, Norm
from tests.grids import covering

# cheaper settings than the defaults; other names run with their defaults
CHEAP = {
    "best": "best:of=deepfool+fmn:steps=5",
    "fmn": "fmn:steps=10",
    "ddn": "ddn:steps=10",
    "cw": "cw:steps=15,binary_search_steps=2",
    "bb": "bb:steps=10",
    "pgd": "pgd:steps=5,rounds=3,restarts=2",
    "apgd": "apgd:steps=5,rounds=3",
    "fab": "fab:steps=3",
}
NAMED = [CHEAP.get(name, name) for name in ESTIMATORS if name not in WRAPPERS]
OTHERS = [
    "foolbox:L2PGD:steps=5",  # draws from torch's generator
    "foolbox:LinfFastGradientAttack",
    "foolbox:LinearSearchBlendedUniformNoiseAttack:directions=5,steps=10",
    "torchattacks:APGD:steps=5",  # reseeds torch's generator
    "torchattacks:SPSA:nb_iter=2,max_batch_size=8",
    "torchattacks:PGDL2:steps=5",
    "torchattacks:DeepFool",
    "torchattacks:CW:steps=5",
]


def slow_first(text: str) -> Any:
    return pytest.param(text, marks=pytest.mark.slow) if text.startswith("bb") else text


ALL = [slow_first(text) for text in NAMED + OTHERS]


class Awkward(nn.Module):
    """Batch norm, dropout, tied weights and a buffer that every pass replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout())
        self.frozen = nn.BatchNorm1d(16)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.head = nn.Linear(16, 4)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.calls = self.calls + 1
        hidden = self.frozen(self.body(images).flatten(1))
        hidden = self.second(functional.relu(self.first(hidden)))
        logits: Tensor = self.head(functional.relu(hidden))
        return logits


class WithLock(Awkward):
    """Cannot be deep-copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class WithNonLeaf(Awkward):
    """Cannot be deep-copied: stores the result of a computation and replaces it in every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = self.head.bias * 2

    def forward(self, images: Tensor) -> Tensor:
        logits = super().forward(images)
        self.kept = logits[0]
        return logits


def awkward(kind: type[Awkward] = Awkward) -> Awkward:
    """A model with mixed train/eval flags, gradients and requires_grad, as training may leave it."""
    torch.manual_seed(1)
    model = kind()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
            nn.init.uniform_(module.weight, 0.5, 1.5)
    with torch.no_grad():  # centred logits, so that boundaries are near
        model.eval().head.bias.sub_(model(torch.rand(64, 1, 4, 4)).mean(0))
    # in training mode, except one deliberately frozen batch norm
    model.train()
    model.frozen.eval()
    model.frozen.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    model.first.weight.grad = torch.randn(16, 16)
    model.frozen.bias.grad = torch.randn(16)
    return model


def some_images(count: int = 4) -> Tensor:
    return torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(2))


class Same:
    """Equal only to itself; keeps its object alive, so that its address is not reused."""

    def __init__(self, thing: object) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.thing is other.thing

    __hash__ = None  # type: ignore[assignment]


def bits(tensor: Tensor | None) -> bytes | None:
    return None if tensor is None else tensor.detach().cpu().numpy().tobytes()


def observable_state(model: nn.Module) -> dict[str, object]:
    """All state that an attack might change, by name."""
    numpy_state = np.random.get_state()
    seen: dict[str, object] = {
        "torch generator": bits(torch.get_rng_state()),
        "numpy generator": (numpy_state[1].tobytes(), numpy_state[2:]),  # type: ignore[index, union-attr]
        "python generator": random.getstate(),
        # what torch.manual_seed stores while CUDA is not initialised
        "cuda generator": [Same(call) for call in torch.cuda._lazy_seed_tracker.get_calls()],
        "handlers": [Same(handler) for handler in logging.root.handlers],
        "log level": logging.root.level,
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }
    for name, module in model.named_modules():
        seen[f"flag {name}"] = module.training
        seen[f"attributes {name}"] = {key: Same(value) for key, value in vars(module).items() if key != "training"}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        seen[f"weight {name}"] = (Same(parameter), bits(parameter), parameter.device)
        seen[f"requires_grad {name}"] = parameter.requires_grad
        seen[f"grad {name}"] = (Same(parameter.grad), bits(parameter.grad))
    for name, buffer in model.named_buffers():
        seen[f"buffer {name}"] = (Same(buffer), bits(buffer))
    return seen


def changed_state(before: dict[str, object], model: nn.Module) -> list[str]:
    """Names of changed state."""
    after = observable_state(model)
    return sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))


def norm_of(text: str) -> Any:
    return sorted(create(text).norms)[0]


def statuses(margins: Margins) -> set[Status]:
    return set(margins.status)


class Planted:
    """An estimator made of a function (model, images, labels) -> candidates."""

    name = "planted"
    norms = frozenset({"l2", "linf"})
    domains = frozenset({"box", "free"})
    tightness: dict[str, float] = {}  # noqa: RUF012
    batch_invariant = True

    def __init__(self, propose: Callable[[Classifier, Tensor, Tensor], Any]) -> None:
        self.propose = propose

    def perturb(self, model: Classifier, images: Tensor, labels: Tensor, norm: str, **_: object) -> Any:
        return self.propose(model, images, labels)


@contextmanager
def no_handlers() -> Iterator[None]:
    """As in a program without configured logging, where `logging.info` installs a handler; pytest has its own."""
    kept, logging.root.handlers = logging.root.handlers, []
    try:
        yield
    finally:
        logging.root.handlers = kept


@pytest.fixture(autouse=True)
def _own_generators() -> Iterator[None]:
    with forked_generators():
        yield


# --- state afterwards ---


@pytest.mark.parametrize(("text", "kind"), covering(ALL, [Awkward, WithLock, WithNonLeaf]))
def test_measuring_leaves_all_state_unchanged(text: str, kind: type[Awkward]) -> None:
    model, images = awkward(kind), some_images()
    with no_handlers():
        before = observable_state(model)
        margins = measure(model, images, create(text), norm_of(text), noise_retries=1)
        assert changed_state(before, model) == []
    assert statuses(margins) & {Status.FOUND, Status.FOUND_AFTER_NOISE}
    assert Status.FAILED not in statuses(margins)


@pytest.mark.parametrize("text", ["deepfool", "pgd:rounds=2", "torchattacks:APGD:steps=5"])
def test_copied_and_locked_models_give_the_same_margins(text: str) -> None:
    one, other = (
        measure(awkward(kind), some_images(), create(text), norm_of(text), noise_retries=0)
        for kind in (Awkward, WithLock)
    )
    assert torch.equal(one.distance, other.distance)
    assert torch.equal(one.forwards, other.forwards)


def apply_side_effects(model: nn.Module) -> None:
    """Every side effect observed in attacks, and some more."""
    model.train()
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    model(some_images().requires_grad_()).sum().backward()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = torch.ones_like(parameter)
    for buffer in model.buffers():
        buffer.fill_(3)


@pytest.mark.parametrize("kind", [Awkward, WithLock, WithNonLeaf])
@pytest.mark.parametrize("error", [RuntimeError, EstimatorError, KeyboardInterrupt])
def test_an_exception_leaves_all_state_unchanged(kind: type[Awkward], error: type[BaseException]) -> None:
    model, images = awkward(kind), some_images()

    def change_state_and_raise(view: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        with torch.enable_grad():
            apply_side_effects(view)
        raise error("it broke")

    before = observable_state(model)
    if error is RuntimeError:  # an exception of the library: failed rows, not an error
        margins = measure(model, images, Planted(change_state_and_raise), "l2")
        assert statuses(margins) == {Status.FAILED}
        assert margins.message == ("RuntimeError: it broke",) * 4
    else:
        with pytest.raises(error, match="it broke"):
            measure(model, images, Planted(change_state_and_raise), "l2")
    assert changed_state(before, model) == []


def test_verification_runs_in_eval_mode_whatever_mode_the_estimator_leaves() -> None:
    """A row's class must depend neither on dropout nor on the statistics of its batch."""

    def leave_training(view: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        view.train()
        return 1 - images

    plain = measure(awkward(), some_images(), Planted(lambda view, images, labels: 1 - images), "l2")
    left = measure(awkward(), some_images(), Planted(leave_training), "l2")
    assert Status.FOUND in statuses(plain)
    assert left.status == plain.status
    assert torch.equal(left.distance, plain.distance)


@pytest.mark.parametrize(
    ("text", "mode"),
    covering(
        [text for text in NAMED if not text.startswith("bb")], [torch.no_grad, torch.inference_mode, torch.enable_grad]
    ),
)
def test_measuring_works_in_every_grad_mode(text: str, mode: Callable[[], AbstractContextManager[None]]) -> None:
    expected = measure(awkward(), some_images(), create(text), norm_of(text), noise_retries=0)
    model = awkward()
    with mode():
        images = some_images()
        before = observable_state(model)
        margins = measure(model, images, create(text), norm_of(text), noise_retries=0)
        assert changed_state(before, model) == []
    assert torch.equal(margins.distance, expected.distance)
    assert not margins.witness.requires_grad
    assert not margins.witness.is_inference()


def test_a_model_created_in_inference_mode() -> None:
    expected = measure(awkward(), some_images(), create("deepfool"), "l2")
    with torch.inference_mode():
        model = awkward()
    model.requires_grad_(False)
    margins = measure(model, some_images(), create("deepfool"), "l2")
    assert torch.equal(margins.distance, expected.distance)


@pytest.mark.parametrize(
    ("text", "layout"),
    covering(
        [*(text for text in NAMED if not text.startswith("bb")), "torchattacks:PGDL2:steps=5"],
        ["requires grad", "transposed", "expanded", "channels last"],
    ),
)
def test_images_of_any_memory_layout(text: str, layout: str) -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    images = torch.rand(3, 2, 4, 4)
    if layout == "requires grad":
        inputs = images.clone().requires_grad_()
    elif layout == "transposed":
        inputs = images.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "expanded":
        images = images[:1].repeat(3, 1, 1, 1)
        inputs = images[:1].expand(3, -1, -1, -1)
    else:
        inputs = images.to(memory_format=torch.channels_last)
        model = model.to(memory_format=torch.channels_last)
    kept = inputs.detach().clone()
    expected = measure(model, images, create(text), norm_of(text), noise_retries=0)
    margins = measure(model, inputs, create(text), norm_of(text), noise_retries=0)
    assert margins.message == expected.message
    assert torch.equal(margins.distance, expected.distance)
    assert torch.equal(inputs, kept)
    assert inputs.grad is None
    assert inputs.requires_grad == (layout == "requires grad")


def test_measuring_between_forward_and_backward() -> None:
    """A callback may measure while the caller's graph waits for its backward pass."""

    def gradients(kind: type[Awkward], interrupt: bool) -> list[bytes | None]:
        model = awkward(kind)
        model.body[3].eval()  # dropout would draw other noise
        loss = model(some_images()).square().sum()
        if interrupt:
            measure(model, some_images(), create("deepfool"), "l2")
        loss.backward()
        return [bits(parameter.grad) for parameter in model.parameters()]

    for kind in (Awkward, WithLock, WithNonLeaf):
        assert gradients(kind, True) == gradients(kind, False)


def test_a_seed_pending_for_cuda_is_preserved() -> None:
    """`torch.manual_seed` is stored until CUDA is initialised."""
    if torch.cuda.is_initialized():
        pytest.skip("CUDA has started in this process")
    model = awkward()
    torch.manual_seed(1234)
    before = list(torch.cuda._lazy_seed_tracker.get_calls())
    measure(model, some_images(), create("torchattacks:APGD:steps=2"), "l2")
    after = torch.cuda._lazy_seed_tracker.get_calls()
    assert len(before) == len(after)
    assert all(one is other for one, other in zip(before, after, strict=True))


# --- controls: the helper detects what library attacks do to an unprotected model ---


def backward(view: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    functional.cross_entropy(view(images), labels).backward()
    return 1 - images


def reseed(view: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    torch.manual_seed(0)
    return 1 - images


def draw(view: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    np.random.rand()
    random.random()
    return images + torch.rand_like(images)


def recover_mode(view: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    view.eval()
    view.train()  # as torchattacks does if the model was in training mode
    return 1 - images


def run_in_training(view: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    view.train()
    view(images)
    return 1 - images


@pytest.mark.parametrize("kind", [Awkward, WithLock])
@pytest.mark.parametrize(
    ("propose", "expected"),
    [
        (backward, {"grad head.weight", "grad first.weight", "grad body.0.bias"}),
        (reseed, {"torch generator", "cuda generator"}),
        (draw, {"torch generator", "numpy generator", "python generator"}),
        (recover_mode, {"flag frozen"}),
        (run_in_training, {"flag frozen", "buffer body.1.running_mean", "buffer frozen.running_var", "buffer calls"}),
    ],
)
def test_disturbing_estimators_change_a_bare_model_but_not_a_measured_one(
    propose: Callable[[nn.Module, Tensor, Tensor], Tensor], expected: set[str], kind: type[Awkward]
) -> None:
    images = some_images()
    with forked_generators():
        bare = awkward(kind)
        before = observable_state(bare)
        propose(bare, images, torch.zeros(4, dtype=torch.int64))
        assert expected <= set(changed_state(before, bare)), "the assertion helper is blind"
    guarded = awkward(kind)
    before = observable_state(guarded)
    measure(guarded, images, Planted(propose), "l2")
    assert changed_state(before, guarded) == []


def test_foolbox_disturbs_a_bare_model() -> None:
    """The stock library writes gradients and installs a log handler: the reason for the isolation."""
    model = awkward().eval()
    with no_handlers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = observable_state(model)
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        foolbox.attacks.L2DeepFoolAttack(steps=1).run(wrapped, some_images(), torch.zeros(4, dtype=torch.int64))
        assert {"handlers", "grad head.weight"} <= set(changed_state(before, model))


# --- counting ---


def affine(classes: int = 4, pixels: int = 9) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes))
    with torch.no_grad():
        weight = torch.randn(classes, pixels, generator=generator)
        model[1].weight.copy_(weight)
        model[1].bias.copy_(0.1 * torch.randn(classes, generator=generator) - 0.5 * weight.sum(1))
    return model


def middle_images(count: int = 3) -> Tensor:
    return 0.45 + 0.1 * torch.rand(count, 1, 3, 3, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    ("text", "forwards", "backwards"),
    [
        # the ranking; the first step's 3 other classes; the pass that finds all rows outside
        ("deepfool:engine=foolbox", 1 + 3 + 1, 3 + 1),
        # the first step; the second one, which finds all rows outside
        ("deepfool", 1 + 1, 3 + 1),
    ],
)
def test_deepfool_on_an_affine_model_has_the_expected_pass_count(text: str, forwards: int, backwards: int) -> None:
    margins = measure(affine(classes=4), middle_images(), create(text), "l2")
    assert statuses(margins) == {Status.FOUND}
    ours = 1 + 1 + 15 + 1  # the clean image; the witness; bisection until 2**-15 < 5e-5 / 1.02; the refined witness
    assert margins.forwards.tolist() == [forwards + ours] * 3
    assert margins.backwards.tolist() == [backwards] * 3


def test_finished_rows_cost_no_further_passes() -> None:
    def ladder(view: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        left = torch.arange(len(images))
        for rung in range(3):
            with view.rows(left):
                leaf = images[left].clone().requires_grad_()
                view(leaf).sum().backward()
                with torch.no_grad():
                    view(leaf)
            left = left[left > rung]
        return images

    margins = measure(affine(), middle_images(4), Planted(ladder), "l2", noise_retries=0)
    assert margins.forwards.tolist() == [4, 6, 8, 8]  # 2 per rung, the clean pass and the check
    assert margins.backwards.tolist() == [1, 2, 3, 3]


def test_nested_rows_and_shares_add_up() -> None:
    images = middle_images(4)
    with frozen_view(affine(), (0.0, 1.0), "box", images.device) as view:
        view.start_chunk(4)
        view(images)
        with view.rows(torch.tensor([1, 3])):
            view(images[[1, 3]])
            with view.rows(torch.tensor([1])):
                view(images[[3]])
            # a library that hides which row it passes: divided over the active rows
            leaf = images[:1].clone().requires_grad_()
            view(leaf).sum().backward()
        assert view.forwards.tolist() == [1.0, 2.5, 1.0, 3.5]
        assert view.backwards.tolist() == [0.0, 0.5, 0.0, 0.5]
        view.classify(images)
        assert view.forwards.sum() == 12
        view.start_chunk(2)
        assert view.forwards.tolist() == [0.0, 0.0]


class Tally(nn.Module):
    """Counts the rows of all passes on the class, which is not copied."""

    forwards = backwards = 0

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        Tally.forwards += len(images)
        logits: Tensor = self.model(images)
        if logits.requires_grad:
            logits.register_hook(self.count_backward)
        return logits

    @staticmethod
    def count_backward(gradient: Tensor) -> None:
        Tally.backwards += len(gradient)


@pytest.mark.parametrize("text", ALL)
def test_every_pass_is_counted(text: str) -> None:
    Tally.forwards = Tally.backwards = 0
    margins = measure(
        Tally(affine()),
        middle_images(5),
        # polishing passes images through the read network, which the tally does not count
        create(text.replace("best:", "best:polish=false,")),
        norm_of(text),
        batch_size=3,
        noise_retries=1,
        checked=True,  # passes of the input checks belong to no image
    )
    assert margins.forwards.sum().item() == pytest.approx(Tally.forwards)
    assert margins.backwards.sum().item() == pytest.approx(Tally.backwards)
    assert (margins.forwards >= 2).all()


def test_passes_of_hidden_rows_are_divided_over_their_chunk() -> None:
    """torchattacks' DeepFool passes single images without their row."""
    margins = measure(affine(), middle_images(4), create("torchattacks:DeepFool"), "l2")
    assert len(set(margins.backwards.tolist())) == 1


# --- the record ---


class Threshold(nn.Module):
    """Class 1 where the first pixel exceeds 0.5."""

    def forward(self, images: Tensor) -> Tensor:
        pixel = images[:, 0, 0, 0]
        return torch.stack([0.5 - pixel, pixel - 0.5], dim=1)


def recorded(points: list[list[float]], image: float = 0.2) -> tuple[float, float]:
    """Send one-pixel ``points`` through a recorded view, one call each; ``(point, distance)`` of row 0."""
    rows = len(points[0])
    images, labels = torch.full((rows, 1, 1, 1), image), torch.zeros(rows, dtype=torch.int64)
    with frozen_view(Threshold(), (0.0, 1.0), "box", images.device) as view:
        view.start_chunk(rows)
        with view.recording(images, labels, "linf") as record:
            for values in points:
                view(torch.tensor(values).view(-1, 1, 1, 1))
        return record.points[0].item(), record.distance[0].item()


@pytest.mark.parametrize(
    ("points", "point", "distance"),
    [
        ([[0.9], [0.6], [0.8]], 0.6, 0.4),  # the nearest, in any order
        ([[0.3], [0.45]], 0.2, float("inf")),  # never a point of the predicted class
        ([[0.9], [0.4]], 0.9, 0.7),
        ([[1.5], [-3.0]], 0.2, float("inf")),  # never outside the box
        ([[1.5], [1.0]], 1.0, 0.8),
        ([[float("nan")], [float("inf")]], 0.2, float("inf")),
    ],
)
def test_the_record_keeps_the_nearest_verified_iterate(
    points: list[list[float]], point: float, distance: float
) -> None:
    kept, how_far = recorded(points)
    assert kept == pytest.approx(point)
    assert how_far == pytest.approx(distance)


def test_the_record_never_keeps_the_image_itself() -> None:
    """A misclassified image is not a witness at distance 0."""
    assert recorded([[0.7]], image=0.7) == (pytest.approx(0.7), float("inf"))


def test_at_equal_distance_the_record_keeps_the_deepest_point() -> None:
    """Iterates on a sphere differ in distance only by rounding, which must not decide between them."""
    angles = torch.tensor([0.2, 0.9, 0.5])
    around = 0.5 + torch.stack([angles.cos(), angles.sin()], 1).view(3, 1, 1, 2) * 0.3
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        record = Record(torch.full((1, 1, 1, 2), 0.5), torch.zeros(1, dtype=torch.int64), "l2", (0.0, 1.0))
        for index in order:
            # the second pixel determines the class
            logits = torch.tensor([[0.0, around[index, 0, 0, 1] - 0.5]])
            record.see(around[index : index + 1] * (1 + 1e-7 * index), logits, torch.tensor([0]))
        torch.testing.assert_close(record.points, around[1:2])
    # the distance does not grow with repetitions
    nearest = record.distance.item()
    for step in range(100):
        farther = 0.5 + (around[1:2] - 0.5) * (1 + 4e-6 * step)
        record.see(farther, torch.tensor([[0.0, 1.0 + step]]), torch.tensor([0]))
    assert record.distance.item() < nearest * (1 + 1.1e-5)


def test_the_record_follows_rows() -> None:
    images, labels = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1, 1), torch.zeros(3, dtype=torch.int64)
    with frozen_view(Threshold(), (0.0, 1.0), "box", images.device) as view:
        view.start_chunk(5)
        recorded_rows, third_and_first = torch.tensor([1, 3, 4]), torch.tensor([2, 0])
        with (
            view.rows(recorded_rows),
            view.recording(images, labels, "linf") as record,
            view.rows(third_and_first),
        ):
            view(torch.tensor([0.6, 0.9]).view(2, 1, 1, 1))
            view(torch.tensor([0.55]).view(1, 1, 1, 1))  # the row is unknown, so the point is not recorded
        view(torch.full((5, 1, 1, 1), 0.51))  # after the record is closed
    torch.testing.assert_close(record.distance, torch.tensor([0.8, torch.inf, 0.3]).double())
    improved = record.improve(torch.zeros_like(images))
    torch.testing.assert_close(improved.flatten(), torch.tensor([0.9, 0.0, 0.6]))


def test_records_nest() -> None:
    images, labels = torch.tensor([0.1, 0.2]).view(2, 1, 1, 1), torch.zeros(2, dtype=torch.int64)
    with frozen_view(Threshold(), (0.0, 1.0), "box", images.device) as view:
        view.start_chunk(2)
        with view.recording(images, labels, "linf") as outer:
            with view.rows(torch.tensor([1])), view.recording(images[1:], labels[1:], "linf") as inner:
                view(torch.tensor([0.7]).view(1, 1, 1, 1))
            view(torch.tensor([0.9, 0.8]).view(2, 1, 1, 1))
    torch.testing.assert_close(inner.distance, torch.tensor([0.5]).double())
    torch.testing.assert_close(outer.distance, torch.tensor([0.8, 0.6]).double())


def test_a_record_of_another_dtype() -> None:
    images = torch.full((1, 1, 1, 1), 0.2, dtype=torch.float64)
    record = Record(images, torch.zeros(1, dtype=torch.int64), "l2", (0.0, 1.0))
    record.see(torch.full((1, 1, 1, 1), 0.75), torch.tensor([[0.0, 1.0]]), torch.tensor([0]))
    assert record.points.item() == 0.75
    assert record.points.dtype == torch.float64


# --- the scale-free view ---


def gradient_of_loss(model: nn.Module, images: Tensor) -> Tensor:
    leaf = images.clone().requires_grad_()
    logits = model(leaf)
    (gradient,) = torch.autograd.grad(functional.cross_entropy(logits, logits.argmax(1)), leaf)
    return gradient


class Scaled(nn.Module):
    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images) * self.factor
        return logits


def test_the_scale_free_view_has_the_argmax_and_no_scale() -> None:
    model, images = affine(), middle_images(8)
    plain = model(images)
    assert torch.equal(ScaleFree(model, 10.0)(images).argmax(1), plain.argmax(1))
    for factor in (1e-3, 1e3, 1e6):
        torch.testing.assert_close(
            ScaleFree(Scaled(model, factor), 10.0)(images), ScaleFree(model, 10.0)(images), rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(
            gradient_of_loss(ScaleFree(Scaled(model, factor), 10.0), images),
            gradient_of_loss(ScaleFree(model, 10.0), images),
            rtol=1e-3,
            atol=1e-7,
        )


def test_the_scale_free_view_has_a_gradient_where_cross_entropy_has_none() -> None:
    saturated, images = Scaled(affine(), 1e5), middle_images(8)
    # control: raw cross-entropy is exactly flat here
    assert gradient_of_loss(saturated, images).eq(0).all()
    rows = gradient_of_loss(ScaleFree(saturated, 10.0), images).flatten(1)
    assert rows.ne(0).any(1).all()


def test_the_scale_free_view_survives_equal_logits() -> None:
    class Flat(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :3] * 0

    logits = ScaleFree(Flat(), 10.0)(middle_images())
    assert logits.isfinite().all()


class Meddler(Settings):
    """Leaves the view in training mode after a pass that changes the statistics of batch norm."""

    name: ClassVar[str] = "meddler"
    norms: ClassVar[frozenset[Norm]] = frozenset({"l2", "linf"})
    domains: ClassVar[frozenset[Domain]] = frozenset({"box"})
    tightness: ClassVar[Mapping[Norm, float]] = {}
    batch_invariant: ClassVar[bool] = True

    def perturb(self, model: Classifier, images: Tensor, labels: Tensor, norm: Norm, **_: object) -> Tensor:
        model.train()
        for _ in range(20):
            model(1.0 - images)
        return (images + 0.01).clamp(0, 1)


def normed_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 36, 4)).eval()


def test_changes_to_the_view_do_not_affect_the_judge() -> None:
    model, images = normed_model(), torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    margins = measure(model, images, Meddler(), "l2", noise_retries=0, batch_size=10)
    with torch.no_grad():
        assert torch.equal(margins.prediction, model(images).argmax(1))
        found = margins.target >= 0
        assert torch.equal(model(margins.witness[found]).argmax(1), margins.target[found])
        # control: with the statistics that the attack left, predictions differ
        model.train()
        for _ in range(20):
            model(1.0 - images)
        assert not torch.equal(margins.prediction, model.eval()(images).argmax(1))


def write_data(view: nn.Module) -> None:
    for parameter in view.parameters():
        parameter.data.mul_(0.1)  # no version counter sees it


def write_in_place(view: nn.Module) -> None:
    with torch.no_grad():
        next(view.parameters()).add_(0.1)


def give_other_data(view: nn.Module) -> None:
    for parameter in view.parameters():
        parameter.data = torch.ones(2)


@pytest.mark.parametrize("kind", [Awkward, WithLock])
@pytest.mark.parametrize("write", [write_data, write_in_place, give_other_data])
def test_an_attack_that_writes_the_weights_fails_and_they_are_restored(
    write: Callable[[nn.Module], None], kind: type[Awkward]
) -> None:
    def late(view: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        calls.append(len(images))
        if len(calls) == 2:
            write(view)
        return 1 - images

    calls: list[int] = []
    model, images, progress = awkward(kind), some_images(6), list[int]()
    before = observable_state(model)
    margins = measure(model, images, Planted(late), "l2", batch_size=2, noise_retries=0, on_progress=progress.append)
    assert changed_state(before, model) == []
    assert margins.status == (Status.FAILED,) * 6  # including the first two, which were measured before
    assert set(margins.message) == {"a change of the network's weights (undone)"}
    assert margins.distance.isinf().all()
    assert torch.equal(margins.witness, images)
    assert (calls, progress) == ([2, 2], [2, 2, 2])
    honest = measure(model, images, create("deepfool"), "l2", noise_retries=0)
    assert torch.equal(honest.distance, measure(awkward(), images, create("deepfool"), "l2", noise_retries=0).distance)


def replace_weights(view: nn.Module) -> None:
    for module in view.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(torch.randn_like(module.weight))


def replace_forward(view: Any) -> None:
    view.network.head.forward = lambda hidden: hidden[:, :4]
    view.network.head.register_forward_hook(lambda module, inputs, result: result * 3)


def write_buffers(view: nn.Module) -> None:
    for buffer in view.buffers():
        buffer.data.fill_(3)


def gather_gradients(view: nn.Module) -> None:
    for parameter in view.parameters():
        parameter.requires_grad_(True)
    view(some_images()).sum().backward()


@pytest.mark.parametrize("kind", [Awkward, WithLock])
@pytest.mark.parametrize("change", [replace_weights, replace_forward, write_buffers, gather_gradients])
def test_other_changes_to_the_network_reach_neither_the_judge_nor_the_caller(
    change: Callable[[nn.Module], None], kind: type[Awkward]
) -> None:
    def propose(view: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        change(view)
        return 1 - images

    model = awkward(kind)
    before = observable_state(model)
    margins = measure(model, some_images(), Planted(propose), "l2", noise_retries=0)
    assert changed_state(before, model) == []
    plain = measure(awkward(), some_images(), Planted(lambda view, images, labels: 1 - images), "l2", noise_retries=0)
    assert torch.equal(margins.distance, plain.distance)
    assert Status.FOUND in statuses(margins)


def leave(view: Classifier, images: Tensor, labels: Tensor) -> Tensor:
    sys.exit(3)


@pytest.mark.parametrize(
    ("propose", "message"),
    [
        (leave, "SystemExit: 3"),
        (lambda view, images, labels: images.to("meta"), "expected witnesses as a dense tensor, got a meta tensor"),
        (
            lambda view, images, labels: images.to_sparse(),
            "expected witnesses as a dense tensor, got layout torch.sparse_coo",
        ),
    ],
    ids=["exit", "meta", "sparse"],
)
def test_an_estimator_that_leaves_or_returns_no_dense_tensor_fails(propose: Any, message: str) -> None:
    margins = measure(awkward(), some_images(), Planted(propose), "l2")
    assert margins.status == (Status.FAILED,) * 4
    assert set(margins.message) == {message}
    assert margins.distance.isinf().all()


def test_the_callers_autocast_and_default_dtype_have_no_effect() -> None:
    model, images = normed_model(), torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    plain = {name: measure(model, images, create(name), "l2") for name in ("deepfool", "fab")}
    with torch.autocast("cpu", torch.bfloat16):
        cast = measure(model, images, create("deepfool"), "l2")
    assert torch.equal(cast.distance, plain["deepfool"].distance)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(measure(model, images, create("fab"), "l2").distance, plain["fab"].distance)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


def test_bounds_that_are_not_exact_in_the_images_dtype_are_accepted() -> None:
    pixels = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    pixels[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    mean, deviation = 0.1307, 0.3081
    bounds = ((0 - mean) / deviation, (1 - mean) / deviation)
    margins = measure(normed_model(), (pixels - mean) / deviation, create("deepfool"), "l2", bounds=bounds)
    assert margins.distance.isfinite().all()
