"""Models of users: wrapped, compiled, with custom functions, without weights."""

import copy
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from attacks.estimator import Margins, Status
from attacks.isolation import Classifier, frozen_view
from attacks.isolation.unwrapping import run_by_copies, unwrapped
from attacks.measure import measure
from attacks.registry import create
from attacks.types import InputError
from harness.config.devices import device_of
from harness.measuring.packing import packed_model
from harness.models.weights import Normalized, load_weights
from harness.store.tensors import load_checkpoint, save_checkpoint, weights_checksum
from harness.tasks import EngineError
from harness.tracking.tracker import MarginTracker
from tests.test_isolation import Planted, changed_state, observable_state

IMAGES = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def net() -> nn.Sequential:
    """A network in training mode, with statistics that a pass in that mode would change."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    norm.running_mean, norm.running_var = torch.randn(3) * 0.3, torch.rand(3) + 0.5
    return nn.Sequential(nn.Conv2d(1, 3, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))


def margins_of(model: nn.Module, images: Tensor = IMAGES, text: str = "deepfool") -> Margins:
    return measure(model, images, create(text), "l2", noise_retries=0)


def touched(before: dict[str, object], model: nn.Module) -> list[str]:
    """The changed state of the model."""
    return [name for name in changed_state(before, model) if "generator" not in name]


@pytest.fixture
def one_rank() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


# wrappers


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


class DistributedDataParallel(nn.Module):
    """Replaces torch's class, which imports the compiler."""

    __module__ = "torch.nn.parallel.distributed"

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        raise AssertionError("a collective was called")


# importing the compiler takes seconds
slow = pytest.mark.slow
WRAPS = [
    pytest.param(compiled, marks=slow, id="compiled"),
    pytest.param(nn.DataParallel, id="DataParallel"),
    pytest.param(ddp, marks=slow, id="DistributedDataParallel"),
    pytest.param(DistributedDataParallel, id="as DistributedDataParallel"),
    pytest.param(AveragedModel, id="AveragedModel"),
    pytest.param(lambda model: nn.DataParallel(AveragedModel(model)), id="DataParallel of AveragedModel"),
    pytest.param(lambda model: compiled(AveragedModel(model)), marks=slow, id="compiled AveragedModel"),
    pytest.param(lambda model: nn.DataParallel(compiled(model)), marks=slow, id="DataParallel of compiled"),
]


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("wrap", WRAPS)
def test_a_wrapped_model_is_measured_as_the_network_inside(
    tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]
) -> None:
    model = wrap(net())
    before = observable_state(model)
    assert torch.equal(margins_of(model).distance, margins_of(net()).distance)
    assert touched(before, model) == []
    assert type(unwrapped(model)) is nn.Sequential
    assert weights_checksum(model) == weights_checksum(net())
    assert packed_model(model) == packed_model(unwrapped(model))
    # a run of the plain network is continued by the wrapped one, and the other way round
    tracker = MarginTracker(tmp_path / "run", {"test": (IMAGES, torch.zeros(6).long())}, ["linear"], ["l2"])
    tracker.update(0, net())
    tracker.update(0, model)
    save_checkpoint(tmp_path / "wrapped.safetensors", model, 0)
    torch.save(net().state_dict(), tmp_path / "weights.pt")
    for load, name in ((load_checkpoint, "wrapped.safetensors"), (load_weights, "weights.pt")):
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        load(tmp_path / name, model)
        assert weights_checksum(model) == weights_checksum(net())


@pytest.mark.parametrize("wrap", [pytest.param(compiled, marks=slow), AveragedModel, nn.DataParallel])
def test_a_wrapper_inside_a_model_is_unwrapped(tmp_path: Path, wrap: Callable[[nn.Module], nn.Module]) -> None:
    plain, model = Normalized(net(), [0.5], [0.25]), Normalized(wrap(net()), [0.5], [0.25])
    before = observable_state(model)
    assert torch.equal(margins_of(model).distance, margins_of(plain).distance)
    assert weights_checksum(model) == weights_checksum(plain)
    save_checkpoint(tmp_path / "plain.safetensors", plain, 0)
    torch.save(net().state_dict(), tmp_path / "weights.pt")
    assert touched(before, model) == []
    for load, name in ((load_checkpoint, "plain.safetensors"), (load_weights, "weights.pt")):
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        load(tmp_path / name, model)
        assert weights_checksum(model) == weights_checksum(plain)


def test_unwrapping_shares_the_weights_and_returns_a_plain_model_unchanged() -> None:
    plain = net()
    assert unwrapped(plain) is plain
    outer = nn.Sequential(nn.Identity(), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.DataParallel(plain))
    inner = unwrapped(outer)
    assert [type(module).__name__ for module in inner.children()] == ["Identity", "ParametrizedLinear", "Sequential"]
    assert type(outer[2]) is nn.DataParallel
    assert all(one is other for one, other in zip(inner.parameters(), outer.parameters(), strict=True))
    assert device_of(outer) == torch.device("cpu")


@slow
def test_a_compiled_model_is_measured_in_batches_of_any_size() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    whole = torch.compile(model, backend="aot_eager")
    inside = copy.deepcopy(model)
    inside.forward = torch.compile(inside.forward, backend="aot_eager")  # type: ignore[method-assign]
    assert whole(IMAGES).shape == inside(IMAGES).shape
    for count in (6, 4, 3):
        truth = margins_of(model, IMAGES[:count])
        for one in (whole, inside):
            measured = margins_of(one, IMAGES[:count])
            assert Status.FAILED not in measured.status
            assert torch.equal(measured.distance, truth.distance)


# functions bound to the original model


def closure(model: nn.Module) -> None:
    layers = list(model.children())

    def forward(images: Tensor) -> Tensor:
        for layer in layers:
            images = layer(images)
        return images

    model.forward = forward  # type: ignore[method-assign]


def under_autocast(model: nn.Module) -> None:
    model.forward = torch.autocast("cpu", enabled=False)(model.forward)  # type: ignore[method-assign]


def compiled_forward(model: nn.Module) -> None:
    model.forward = torch.compile(model.forward, backend="eager")  # type: ignore[method-assign]


def hook(model: Any) -> None:
    def again(module: nn.Module, inputs: Any, result: Tensor) -> Tensor:
        model[1](inputs[0])  # changes the statistics in training mode
        return result

    model[1].register_forward_hook(lambda *call: again(*call) if model[1] is not call[0] else None)
    model[2].register_forward_pre_hook(lambda module, inputs: model[1](inputs[0]) * 0 + inputs[0])


def attribute(model: Any) -> None:
    head, weight = model[4], partial(lambda linear, hidden: functional.linear(hidden, linear.weight, linear.bias))
    model.helpers = {"head": [lambda hidden: weight(head, hidden)]}
    model[4].forward = lambda hidden: model.helpers["head"][0](hidden)


def weak(model: Any) -> None:
    model[3].whole = weakref.ref(model)


@pytest.mark.parametrize(
    "change", [closure, under_autocast, pytest.param(compiled_forward, marks=slow), hook, attribute, weak]
)
def test_functions_that_run_the_callers_model_run_it_frozen(change: Callable[[nn.Module], None]) -> None:
    model = net()
    change(model)
    assert run_by_copies(model)
    before = observable_state(model)
    measured = margins_of(model)
    assert touched(before, model) == []  # batch norm has counted nothing
    torch.testing.assert_close(measured.distance, margins_of(net()).distance, rtol=1e-5, atol=0)
    assert Status.FAILED not in measured.status


def bound(model: Any) -> None:
    model[2].register_forward_hook(model.note)
    model.forward = partial(type(model).forward, model)
    model[4].scale = partial(torch.mul, model[4].bias)


class Noting(nn.Sequential):
    def note(self, module: nn.Module, inputs: Any, result: Tensor) -> None:
        self[1](inputs[0] * 0 + result)


def test_methods_of_the_model_are_copied_with_it() -> None:
    model = Noting(*net())
    bound(model)
    assert not run_by_copies(model)
    before = observable_state(model)
    assert torch.equal(margins_of(model).distance, margins_of(net()).distance)
    assert touched(before, model) == []


@pytest.mark.parametrize("kind", ["tied", "weight_norm", "old weight_norm", "spectral_norm"])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_models_with_tied_or_parametrized_weights(kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    if kind == "tied":
        model[3].weight = model[1].weight
    else:
        norms: dict[str, Any] = {
            "weight_norm": nn.utils.parametrizations.weight_norm,
            "old weight_norm": nn.utils.weight_norm,
            "spectral_norm": nn.utils.parametrizations.spectral_norm,
        }
        norms[kind](model[1])
    plain = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    with torch.no_grad():
        model.eval()
        for mine, its in zip(plain[1::2], model[1::2], strict=True):
            mine.weight.copy_(its.weight)
            mine.bias.copy_(its.bias)
        model.train()
    before = observable_state(model)
    torch.testing.assert_close(margins_of(model).distance, margins_of(plain).distance, rtol=1e-4, atol=0)
    assert touched(before, model) == []


def test_threads_that_measure_a_model_in_place_take_turns() -> None:
    model, inside, most, found = net(), 0, 0, list[Margins]()
    closure(model)
    guard = threading.Lock()

    def propose(view: Classifier, images: Tensor, labels: Tensor) -> Tensor:
        nonlocal inside, most
        with guard:
            inside += 1
            most = max(most, inside)
        for _ in range(20):
            view(images)
        with guard:
            inside -= 1
        return 1 - images

    def work() -> None:
        with frozen_view(model, (0.0, 1.0), "box", IMAGES.device):  # the same thread may freeze it recursively
            found.append(measure(nn.Sequential(model), IMAGES, Planted(propose), "l2", noise_retries=0))

    before = observable_state(model)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert len(found) == 4
    assert all(torch.equal(one.distance, found[0].distance) for one in found)
    assert touched(before, model) == []


@pytest.mark.parametrize("change", [closure, under_autocast, attribute])
def test_a_model_with_functions_bound_to_the_original_is_not_sent(change: Callable[[nn.Module], None]) -> None:
    model = net()
    change(model)
    name = "helpers" if change is attribute else "forward"
    with pytest.raises(EngineError) as caught:
        packed_model(model)
    assert str(caught.value) == (
        f"expected a model that can be sent to another process, got Sequential with {name}, a function that runs the "
        "model which is here; make it a method of the class, or measure without workers"
    )


# models without weights


class FSDPModule(nn.Flatten):
    """Replaces torch's class, which needs processes."""

    __module__ = "torch.distributed.fsdp.test"


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(4)),
            "expected a model with weights, got 1.weight of a lazy layer that has seen no image; "
            "call the model on a batch first",
        ),
        (
            lambda: net().to("meta"),
            "expected a model with weights, got 0.weight on the meta device; load its weights first",
        ),
        (
            lambda: nn.Sequential(FSDPModule(), nn.Linear(16, 4)),
            "expected a model with all of its weights here, got sharded ones in FSDPModule 0; "
            "gather them into a plain model on one rank",
        ),
    ],
    ids=["lazy", "meta", "sharded"],
)
def test_a_model_without_its_weights_gives_a_one_line_error(
    tmp_path: Path, make: Callable[[], nn.Module], message: str
) -> None:
    model = make()
    tracker = MarginTracker(tmp_path / "run", {"test": (IMAGES, torch.zeros(6).long())}, ["linear"], ["l2"])
    for act in (lambda: margins_of(model), lambda: tracker.update(0, model), lambda: weights_checksum(model)):
        with pytest.raises(InputError) as caught:
            act()
        assert str(caught.value) == message
    assert not (tmp_path / "run" / "manifest.json").exists()
