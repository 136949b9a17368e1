"""Measuring on a CUDA device: the CPU's distances, tensors stay on their device, generators restored."""

import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from attacks.estimator import Status
from attacks.isolation import frozen_view
from attacks.measure import measure
from attacks.registry import create
from attacks.types import InputError
from harness import MarginTracker
from harness.store.tables import read_part
from harness.workers import Workers

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _full_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32, cuDNN's default, rounds the inputs of convolutions to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def small_cnn() -> nn.Module:
    torch.manual_seed(31)
    layers = [nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 5)]
    return nn.Sequential(*layers)


def some_images() -> Tensor:
    return torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(32))


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("text", ["deepfool", "fmn", "fmn:steps=20,targets=3", "sdf", "linear"])
def test_distances_match_the_cpu(text: str, norm: Any) -> None:
    if norm not in create(text).norms:
        pytest.skip(f"{text} has no {norm}")
    on_cpu = measure(small_cnn(), some_images(), create(text), norm)
    model, images = small_cnn().cuda(), some_images().cuda()
    on_gpu = measure(model, images, create(text), norm)
    assert set(on_cpu.status) == {Status.FOUND}
    assert on_gpu.status == on_cpu.status
    torch.testing.assert_close(on_gpu.distance, on_cpu.distance, rtol=1e-3, atol=0)
    assert {parameter.device.type for parameter in model.parameters()} == {images.device.type} == {"cuda"}
    # margins are stored on the CPU, for tables and files
    assert on_gpu.distance.device.type == on_gpu.witness.device.type == "cpu"


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("text", ["cascade", "best:of=deepfool+fmn:steps=20"])
def test_walks_with_a_budget_end_as_on_the_cpu(text: str, norm: Any) -> None:
    """Many steps amplify rounding: the averages agree, and every image is found within the budget."""
    on_cpu = measure(small_cnn(), some_images(), create(text), norm)
    on_gpu = measure(small_cnn().cuda(), some_images().cuda(), create(text), norm)
    assert on_gpu.status == on_cpu.status
    torch.testing.assert_close(on_gpu.distance.mean(), on_cpu.distance.mean(), rtol=1e-2, atol=0)
    if text == "cascade":
        assert (on_gpu.forwards + on_gpu.backwards).max() <= 300


@pytest.mark.parametrize(
    "text", ["deepfool", "ddn:steps=10", "pgd:rounds=2,restarts=2", "apgd:rounds=2", "fab", "cascade"]
)
def test_generators_of_all_devices_are_restored(text: str) -> None:
    model, images = small_cnn().cuda(), some_images().cuda()
    torch.cuda.manual_seed_all(5)
    torch.rand(3, device="cuda")
    before = torch.get_rng_state(), torch.cuda.get_rng_state_all()
    margins = measure(model, images, create(text), "l2", noise_retries=1)
    after = torch.get_rng_state(), torch.cuda.get_rng_state_all()
    assert Status.FAILED not in margins.status
    assert torch.equal(before[0], after[0])
    assert all(torch.equal(one, other) for one, other in zip(before[1], after[1], strict=True))
    assert [parameter.grad for parameter in model.parameters()] == [None] * 4


def test_images_on_another_device_than_the_model_are_refused() -> None:
    with pytest.raises(InputError, match=r"^expected a model that takes images of shape .+ on cpu, got RuntimeError: "):
        measure(small_cnn().cuda(), some_images(), create("deepfool"), "l2")
    with pytest.raises(
        InputError, match=r"on cuda:0, got RuntimeError: .+; give it the images' shape, dtype and device$"
    ):
        measure(small_cnn(), some_images().cuda(), create("deepfool"), "l2")


def test_logits_on_another_device_than_the_images_are_refused() -> None:
    class Moving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = small_cnn().cuda()

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.model(images.cuda())
            return logits

    with pytest.raises(InputError, match=r"at least 2 classes on cpu, got \(16, 5\) on cuda:0; "):
        measure(Moving(), some_images(), create("deepfool"), "l2")


def waits(text: str, norm: Any, images: Tensor, model: nn.Module) -> int:
    """How often an estimator synchronises the host with the device after its candidates are chosen."""
    with frozen_view(model, (0.0, 1.0), "box", images.device) as view:
        view.classes, view.batch_size = 5, len(images)
        view.start_chunk(len(images))
        labels = view(images).argmax(1)
        seeds = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                create(text).perturb(view, images, labels, norm, seeds=seeds)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchron" in str(one.message) for one in caught)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_descent_loops_do_not_synchronise_with_the_device(norm: Any) -> None:
    model, images = small_cnn().cuda(), some_images().cuda()
    texts = ("fmn:steps=20", "fmn:steps=40", *(("ddn:steps=20", "ddn:steps=40") if norm == "l2" else ()))
    synchronisations = {text: waits(text, norm, images, model) for text in texts}
    # a check for converged walks every ten steps, and a few at the end
    assert synchronisations["fmn:steps=40"] - synchronisations["fmn:steps=20"] <= 10
    if norm == "l2":
        assert synchronisations["ddn:steps=40"] == synchronisations["ddn:steps=20"] <= 5


def test_deepfool_synchronises_with_the_device_a_few_times_per_step() -> None:
    """Once to select unfinished images and once to reconsider classes, not once per class."""
    model, images = small_cnn().cuda(), some_images().cuda()
    margins = measure(model, images, create("deepfool"), "l2")
    steps = int(margins.forwards.max())
    assert waits("deepfool", "l2", images, model) <= 12 * steps


def test_the_librarys_deepfool_and_pgd_run_on_the_device() -> None:
    for text, norm in (("deepfool:engine=foolbox", "l2"), ("deepfool:engine=foolbox", "linf"), ("pgd", "linf")):
        on_cpu = measure(small_cnn(), some_images(), create(text), norm)  # type: ignore[arg-type]
        on_gpu = measure(small_cnn().cuda(), some_images().cuda(), create(text), norm)  # type: ignore[arg-type]
        assert on_gpu.status == on_cpu.status
        torch.testing.assert_close(on_gpu.distance, on_cpu.distance, rtol=1e-2, atol=0)


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_workers_share_the_device(device: str, tmp_path: Path) -> None:
    engine, probes = Workers(2), {"test": (some_images(), torch.arange(16) % 5)}
    distances = []
    for name, chosen in (("alone", None), ("beside", engine)):
        model = small_cnn().to(device)
        tracker = MarginTracker(tmp_path / name, probes, ["deepfool"], batch_size=2, engine=chosen)
        tracker.update(0, model)
        tracker.close()
        parts = [read_part(path)[0] for path in tracker.folder.margin_parts()]
        distances.append(torch.tensor(pd.concat(parts)["distance"].to_numpy()))
        assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    torch.testing.assert_close(*distances, rtol=1e-3, atol=0)
