"""Warm starts: starting points, saved passes, and detection of a dependence on the path."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import harness.measuring.margins
from attacks.estimator import Settings, Status, setting
from attacks.estimators.deepfool import DeepFool
from attacks.estimators.fmn import FMN, PUSHES, push_out
from attacks.isolation import Classifier, frozen_view
from attacks.measure import measure
from attacks.types import DOMAINS, NORMS, Domain, InputError, Norm
from harness import MarginTracker
from harness.compare import main as compare
from harness.config.options import ConfigError
from harness.measuring.plan import warm_starts
from harness.report.build import evaluate
from harness.report.page import render
from harness.report.prose.warm import warm_sentences
from harness.runs import read_run
from harness.statistics.envelope import ENVELOPE
from harness.statistics.observations.evidence import gather
from harness.statistics.warm import (
    FARTHER,
    LEVEL,
    NEARER,
    SAVING_COLUMNS,
    UNDECIDED,
    warm_pairs,
    warm_ratios,
    warm_savings,
)
from harness.store import RunFolder, Unit
from harness.store.identity import StoreError
from harness.store.tables import read_part
from harness.store.tensors import load_tensors
from harness.track import main
from tests import simulate
from tests.runs import ONE_LINE, contents, state
from tests.test_resume import assert_same_run, half_written, really_write, writing

Trained = tuple[nn.Module, Tensor, Tensor]
WARM = FMN(steps=40, warm=10)


def later(network: nn.Module, epoch: int, change: float = 0.03) -> nn.Module:
    """The network after further training: every weight is perturbed, more at later epochs."""
    moved = copy.deepcopy(network)
    for seed in range(epoch):
        draw = torch.Generator().manual_seed(seed)
        for weight in moved.parameters():
            weight.data += change * weight.data.std() * torch.randn(weight.shape, generator=draw)
    return moved


# estimators


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_fmn_from_a_start_is_cheaper_with_equal_margins(norm: Norm, trained_digits: Trained) -> None:
    network, images = trained_digits[0], trained_digits[1][:120]
    start = measure(network, images, FMN(), norm).witness
    cold, warm = (
        measure(later(network, 1), images, e, norm, start=s) for e, s in ((FMN(), None), (FMN(warm=20), start))
    )
    assert set(warm.status) == {Status.FOUND}
    passes = [float((margins.forwards + margins.backwards).mean()) for margins in (cold, warm)]
    assert passes[0] > 130
    assert passes[1] < 100
    ratio = warm.distance / cold.distance
    assert float(warm.distance.mean() / cold.distance.mean()) <= 1.005
    assert float((ratio > 1.01).double().mean()) <= 0.05


@pytest.mark.parametrize("norm", NORMS)
def test_images_without_a_start_are_measured_cold(norm: Norm, trained_digits: Trained) -> None:
    network, images = trained_digits[0], trained_digits[1][:12]
    cold = measure(network, images, WARM, norm)
    assert torch.equal(cold.distance, measure(network, images, FMN(steps=40), norm).distance)
    start = cold.witness.clone()
    start[:4], start[4:8] = torch.nan, images[4:8]
    start[1, 0, 0, 0] = 0.5  # a single pixel is not a start either
    warm = measure(network, images, WARM, norm, start=start)
    torch.testing.assert_close(warm.distance[:8], cold.distance[:8], rtol=1e-6, atol=0)
    assert torch.equal(warm.forwards[:8], cold.forwards[:8])
    assert (warm.forwards + warm.backwards)[8:].max() < 75 < (cold.forwards + cold.backwards).min()


def test_a_start_is_moved_outward_until_it_is_a_witness() -> None:
    class Threshold(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.stack([0.5 - images.mean((1, 2, 3)), images.mean((1, 2, 3)) - 0.5], 1)

    images, labels = torch.full((6, 1, 1, 1), 0.2), torch.zeros(6, dtype=torch.int64)
    start = torch.tensor([0.55, 0.49, 0.44, 0.36, 0.3, 0.55]).view(6, 1, 1, 1)
    given = torch.tensor([True] * 5 + [False])
    with frozen_view(Threshold(), (0.0, 1.0), "box", torch.device("cpu")) as view:
        view.start_chunk(6)
        points, outside = push_out(view, images, labels, start, given, PUSHES)
        assert view.forwards.tolist() == [1, 2, 3, 4, 4, 0]
    assert outside.tolist() == [True, True, True, True, False, False]
    expected = [0.55, 0.2 + 1.1 * 0.29, 0.2 + 1.3 * 0.24, 0.2 + 2 * 0.16, 0.3, 0.55]
    assert points.flatten().tolist() == pytest.approx(expected)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stale(Settings):
    """A planted defect: returns the start unchanged if there is one; otherwise DeepFool."""

    name: ClassVar[str] = "stale"
    norms: ClassVar[frozenset[Norm]] = frozenset(NORMS)
    domains: ClassVar[frozenset[Domain]] = frozenset(DOMAINS)
    tightness: ClassVar[Mapping[Norm, float]] = {"l2": 1.001, "linf": 1.001}
    batch_invariant: ClassVar[bool] = True
    WARM: ClassVar[int] = 1
    starts: ClassVar[list[Tensor | None]] = []

    warm: int = setting(0, least=0)

    def perturb(
        self,
        model: Classifier,
        images: Tensor,
        labels: Tensor,
        norm: Norm,
        *,
        seeds: Tensor,
        start: Tensor | None = None,
    ) -> Tensor:
        if self.warm:
            Stale.starts.append(start)
        return DeepFool().perturb(model, images, labels, norm, seeds=seeds) if start is None else start


@pytest.fixture(autouse=True)
def no_starts() -> Iterator[None]:
    Stale.starts.clear()
    yield
    Stale.starts.clear()


def test_without_a_start_the_image_itself_is_used(trained_digits: Trained) -> None:
    network, images = trained_digits[0], 100 * trained_digits[1][:3] - 50
    start = images.clone() + 1
    start[1], start[2, 0, 0, 0] = torch.nan, torch.inf
    measure(network, images, Stale(warm=1), "l2", bounds=(-50.0, 50.0), noise_retries=0, start=start)
    (seen,) = Stale.starts
    assert seen is not None
    torch.testing.assert_close(seen[1:], (images[1:] + 50) / 100)
    torch.testing.assert_close(seen[0], ((start[0] + 50) / 100).clamp(0, 1))


def test_warm_and_cold_forms_of_estimators() -> None:
    named = {"deepfool": DeepFool(), "fmn:steps=40": FMN(steps=40), "fmn:warm=7": FMN(warm=7)}
    warm, cold, lines = warm_starts(named)
    assert list(warm) == ["deepfool", "fmn:steps=40,warm=20", "fmn:steps=40", "fmn:warm=7", "fmn"]
    assert warm["fmn:steps=40,warm=20"] == FMN(steps=40, warm=FMN.WARM)
    assert cold == {"fmn:steps=40", "fmn"}
    assert lines == ["deepfool has no warm start: measured cold"]
    with pytest.raises(ConfigError) as caught:
        warm_starts({"deepfool": DeepFool()})
    assert ONE_LINE.fullmatch(str(caught.value))


# tracking


def track(folder: Path, images: Tensor, *estimators: Any, **options: Any) -> MarginTracker:
    labels = torch.zeros(len(images), dtype=torch.int64)
    options = {"norms": ["l2"], "noise_retries": 0} | options
    return MarginTracker(folder, {"test": (images, labels, 3 * torch.arange(len(images)))}, list(estimators), **options)


def test_every_epoch_starts_from_the_witnesses_of_the_one_before(tmp_path: Path, trained_digits: Trained) -> None:
    network, images = trained_digits[0], trained_digits[1][:40]
    tracker = track(tmp_path, images, Stale(warm=1))
    (unit,) = tracker.units
    before: Tensor | None = None
    for epoch in (0, 1, 3):
        tracker.update(epoch, later(network, epoch))
        (start,) = Stale.starts
        Stale.starts.clear()
        if before is None:
            assert start is None
        else:
            assert start is not None
            assert torch.equal(start, before)
        kept = load_tensors(tracker.folder.witnesses(epoch, unit))
        # the image itself where nothing was found
        before = images.clone()
        before[kept["test.image"] // 3] = kept["test.witness"]
    _, facts = read_part(tracker.folder.margins(3, unit))
    assert facts["start"] == "1"
    assert "start" not in read_part(tracker.folder.margins(0, unit))[1]
    assert 0 < len(kept["test.image"]) < 40


def test_an_epoch_that_is_too_late_is_refused_or_left_out(tmp_path: Path, trained_digits: Trained) -> None:
    network, images = trained_digits[0], trained_digits[1][:4]
    tracker = track(tmp_path, images, FMN(steps=5, warm=3), "linear")
    for epoch in (0, 2):
        tracker.update(epoch, later(network, epoch))
    assert not tracker.has(1)  # linear
    with pytest.raises(StoreError, match="expected epochs in order for fmn"):
        tracker.update(1, later(network, 1))
    assert set(tracker.update(1, later(network, 1), refuse_late=False)["estimator"]) == {"linear"}
    assert tracker.has(1)


@pytest.mark.slow
def test_cold_forms_are_measured_at_a_sample_of_epochs(tmp_path: Path, trained_digits: Trained) -> None:
    network, images = trained_digits[0], trained_digits[1][:4]
    tracker = track(tmp_path, images, FMN(steps=5), "linear", warm_start=True, cold_every=3)
    for epoch in range(6):
        tracker.update(epoch, later(network, epoch), last=epoch == 5)
    epochs = {text: tracker.folder.measured_epochs(Unit(text, "l2")) for text in tracker.estimators}
    assert epochs == {"fmn:steps=5,warm=20": [*range(6)], "fmn:steps=5": [0, 1, 3, 5], "linear": [*range(6)]}
    assert tracker.skipped == ["linear has no warm start: measured cold"]
    # the cold form equals a cold run alone
    alone = track(tmp_path / "alone", images, FMN(steps=5))
    alone.update(3, later(network, 3))
    ours, theirs = (read_part(t.folder.margins(3, Unit("fmn:steps=5", "l2")))[0] for t in (tracker, alone))
    pd.testing.assert_frame_equal(ours.drop(columns="seconds"), theirs.drop(columns="seconds"), check_exact=True)
    with pytest.raises(InputError, match="cold_every of at least 1, got 0"):
        track(tmp_path / "none", images, FMN(), warm_start=True, cold_every=0)
    # warm starts define another run
    with pytest.raises(StoreError, match="warm_start None"):
        track(tmp_path, images, FMN(steps=5))


def test_epochs_out_of_order_are_refused_and_change_nothing(tmp_path: Path, trained_digits: Trained) -> None:
    network, images = trained_digits[0], trained_digits[1][:40]
    tracker = track(tmp_path, images, "linear", WARM)
    tracker.update(0, network)
    tracker.update(4, later(network, 4))
    before = state(tmp_path)
    with pytest.raises(StoreError) as caught:
        tracker.update(2, later(network, 2))
    assert ONE_LINE.fullmatch(str(caught.value))
    assert "fmn:steps=40,warm=10 l2" in str(caught.value)
    assert "got 2 after 4" in str(caught.value)
    assert state(tmp_path) == before
    # control: a cold estimator may be measured at any time
    track(tmp_path, images, "linear").update(2, later(network, 2))


def test_missing_witnesses_are_reported(tmp_path: Path, trained_digits: Trained) -> None:
    network, images = trained_digits[0], trained_digits[1][:40]
    tracker = track(tmp_path, images, WARM)
    for epoch in (0, 1):
        tracker.update(epoch, later(network, epoch))
    tracker.folder.margins(1, tracker.units[0]).unlink()
    with pytest.raises(StoreError, match=r"expected 40 test witnesses of .* at epoch 0 to start from, got 16; delete"):
        tracker.update(1, later(network, 1))


OPTIONS = [
    *("--model", "tests.runs:net", "--train-images", "96", "--test-images", "40", "--device", "cpu", "--probe", "20"),
    *("--noise-retries", "1", "--estimator", "fmn:steps=6,warm=3", "--estimator", "deepfool:steps=5", "--norm", "l2"),
    *("--warm-start", "--cold-every", "2", "--epochs", "2"),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("warm") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.report.build.write_report", lambda *_: [])
        assert main([*OPTIONS, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.report.build.write_report", lambda *_: [])


def interrupted(folder: Path) -> list[int]:
    """Exit codes of a run that is interrupted before or after every file in turn and resumed."""
    stopped = list[Path]()

    def stop_at_what_is_new(path: Path, write: Callable[[Path], object]) -> None:
        if path in stopped:
            really_write(path, write)
            return
        stopped.append(path)
        really_write(path, half_written(write) if len(stopped) % 2 else write)
        raise KeyboardInterrupt

    codes: list[int] = []
    with writing(stop_at_what_is_new):
        while not codes or codes[-1] == 130:
            codes.append(main([*OPTIONS, "--out", str(folder), "--resume"]))
    return codes


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_a_warm_run_interrupted_at_every_file_gives_the_same_result(tmp_path: Path, whole: Path) -> None:
    codes = interrupted(tmp_path / "run")
    assert codes[-1] == 0
    assert len(codes) > 20
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_control_thinning_before_the_margins_exist_is_detected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = harness.measuring.margins.keep_witnesses

    def too_early(folder: RunFolder, epoch: int, unit: Unit, *given: Any) -> None:
        keep(folder, epoch, unit, *given)
        with monkeypatch.context() as patch:
            patch.setattr(RunFolder, "measured_epochs", lambda *_: [epoch])
            harness.measuring.margins.thin_witnesses(folder, unit, set())

    monkeypatch.setattr("harness.measuring.margins.keep_witnesses", too_early)
    assert interrupted(tmp_path / "run")[-1] == 1
    assert "to start from, got 16; " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_compare_gives_the_margins_of_tracking_or_refuses(
    tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, warm = tmp_path / "run", "fmn:steps=6,warm=3"
    shutil.copytree(whole, run)
    for path in [path for name in ("margins", "witnesses") for path in (run / name).rglob("fmn*")]:
        path.unlink()
    before = contents(run)
    capsys.readouterr()
    assert compare([str(run), "--estimator", warm, "--norm", "l2", "--epoch", "2"]) == 1
    stderr = capsys.readouterr().err
    assert "expected all measured epochs for fmn:steps=6,warm=3" in stderr
    assert ONE_LINE.fullmatch(stderr.rstrip("\n"))
    assert contents(run) == before
    assert compare([str(run), "--estimator", warm, "--norm", "l2", "--threads", "1"]) == 0
    for epoch in range(3):
        ours, theirs = (read_part(RunFolder(path).margins(epoch, Unit(warm, "l2")))[0] for path in (run, whole))
        pd.testing.assert_frame_equal(ours.drop(columns="seconds"), theirs.drop(columns="seconds"), check_exact=True)


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_the_command_prints_the_saved_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*OPTIONS, "--out", str(tmp_path / "run"), "--epochs", "1"]) == 0
    printed = capsys.readouterr().out
    assert "deepfool:steps=5 has no warm start: measured cold" in printed
    assert "fmn:steps=6,warm=3 (run), L₂, test: " in printed
    assert main([*OPTIONS, "--out", str(tmp_path / "no"), "--estimator", "nothing"]) == 2
    options = [word for word in OPTIONS if word != "fmn:steps=6,warm=3"]
    options.remove("--estimator")
    assert main([*options, "--out", str(tmp_path / "no")]) == 2
    assert "expected an estimator that can start from witnesses (fmn) with --warm-start" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


# reported savings


def test_pairs_of_warm_and_cold() -> None:
    def entry(text: str, **parameters: object) -> dict[str, object]:
        return {"estimator": text, "name": text.partition(":")[0], "parameters": parameters}

    entries = [
        *(entry("fmn", steps=100, warm=0), entry("fmn:warm=9", steps=100, warm=9), entry("deepfool", steps=50)),
        *(entry("fmn:steps=9,warm=9", steps=9, warm=9), entry("cascade:warm=9", steps=100, warm=9)),
    ]
    assert warm_pairs(entries) == {"fmn:warm=9": "fmn", "fmn:steps=9,warm=9": "", "cascade:warm=9": ""}
    none = pd.DataFrame(columns=["run", *SAVING_COLUMNS])
    assert warm_sentences(none, {"r": {"fmn:steps=9,warm=9": ""}}) == [
        "fmn:steps=9,warm=9 (r) starts from the witnesses of the epoch before and was not measured cold as well: "
        "whether its margins depend on the path is unknown."
    ]


EPOCHS = [0, 1, 5, 9]


def reported_savings(factors: list[float], count: int = 400, *, noise: float = 0.002, lost: int = 0) -> pd.Series:
    """Reported savings of a warm estimator whose distances are these multiples of the cold ones at `EPOCHS`."""
    draw = np.random.default_rng(0)
    cold = draw.lognormal(-1, 0.4, (count, 10))
    every = np.interp(np.arange(10), EPOCHS, factors) * cold * np.exp(noise * draw.standard_normal(cold.shape))
    every[:, 0] = cold[:, 0]
    every[:lost, 9] = np.nan
    rows = pd.concat(
        [
            simulate.margin_rows(every, estimator="warm", forwards=np.where(np.arange(10) > 0, 20.0, 60.0) + 0 * cold),
            simulate.margin_rows(cold[:, EPOCHS], epochs=np.array(EPOCHS), estimator="cold", forwards="95"),
        ],
        ignore_index=True,
    ).astype({"forwards": float})
    ratios = warm_ratios(rows, {"warm": "cold"})
    assert ratios["epoch"].tolist() == EPOCHS
    assert ratios["start"].fillna(-1).tolist() == [-1, 0, 4, 8]
    for (_, row), factor in zip(ratios.iloc[1:].iterrows(), factors[1:], strict=True):
        assert row["low"] < row["ratio"] < row["high"]
        assert row["ratio"] == pytest.approx(factor, abs=3 * noise)
    (table,) = (one for _, one in warm_savings(ratios, rows).iterrows())
    return table


def test_savings_of_a_warm_start_match_hand_calculation() -> None:
    row = reported_savings([1, 1, 1, 0.95])
    # 25 passes instead of 100; 65 + 9 * 25 and four samples of 100 instead of ten
    assert row["passes"] == 25
    assert row["cold_passes"] == 100
    assert row["saved"] == pytest.approx(0.75)
    assert row["net"] == pytest.approx(1 - (65 + 9 * 25 + 400) / 1000)
    assert row["nearer"] == pytest.approx(1 / 3)  # all images at one of the three epochs with a start
    assert row[["farther", "lost"]].tolist() == [0, 0]
    assert row["last"] == pytest.approx(0.95, abs=1e-3)
    assert (row["verdict"], row["apart"]) == (NEARER, True)
    (line,) = warm_sentences(pd.DataFrame([row]).assign(run="r"), {})
    assert "25 passes per image instead of 100 (75% fewer; with the cold samples 31% fewer); warm / cold 1.000" in line
    (line,) = warm_sentences(pd.DataFrame([row]).assign(run="r", net=-0.09), {})
    assert "with the cold samples 9% more" in line


@pytest.mark.parametrize(
    ("factors", "given", "verdict", "apart"),
    [
        ([1, 1, 1, 1], {}, LEVEL, False),
        ([1, 1.002, 1, 0.996], {}, LEVEL, True),
        ([1, 0.97, 0.97, 0.97], {}, NEARER, False),
        ([1, 1, 1.05, 1], {}, FARTHER, False),
        ([1, 1, 1, 1], {"lost": 8}, FARTHER, False),
        ([1, 1, 1, 1], {"lost": 4}, LEVEL, False),
        ([1, 1, 1, 1], {"count": 12, "noise": 0.03}, UNDECIDED, False),
    ],
)
def test_verdicts_on_warm_starts(factors: list[float], given: Any, verdict: str, apart: bool) -> None:
    row = reported_savings(factors, **given)
    assert (row["verdict"], row["apart"]) == (verdict, apart)


def run_of(folder: Path, trained: Trained, estimator: Settings) -> Any:
    tracker = track(folder, trained[1][:100], estimator, DeepFool(), warm_start=True, cold_every=2)
    for epoch in range(5):
        tracker.update(epoch, later(trained[0], epoch))
    return evaluate([read_run(folder)])


@pytest.mark.slow
def test_an_estimator_that_returns_its_start_is_reported(tmp_path: Path, trained_digits: Trained) -> None:
    bad = run_of(tmp_path / "stale", trained_digits, Stale())
    good = run_of(tmp_path / "fmn", trained_digits, FMN(steps=40))
    assert bad.savings["verdict"].tolist() == [FARTHER]
    (line,) = bad.warm
    assert "Its margins depend on the path and are too large: use stale instead" in line
    assert line.startswith("stale:warm=1 (stale), L₂, test: ")
    # control: descents from the same starts are not reported
    assert good.savings["verdict"].isin([LEVEL, NEARER]).all()
    assert "too large" not in good.warm[0]
    # both are on their pages
    for content in (bad, good):
        page = render(content)
        assert '<section id="warm">' in page
        assert page.count(content.warm[0].split(". ")[-1].replace("'", "&#39;")) >= 1
        assert 'data-save="warm-ratios"' in page


@pytest.mark.slow
def test_sampling_epochs_of_one_estimator_keeps_the_envelope_and_verdicts_of_others() -> None:
    draw = np.random.default_rng(0)
    values = draw.lognormal(-1, 0.4, (40, 10))
    tables = [simulate.margin_rows(values * factor, estimator=name) for name, factor in (("a", 1.0), ("w", 0.98))]
    sample = simulate.margin_rows(values[:, EPOCHS] * 0.9, epochs=np.array(EPOCHS), estimator="c")
    run = simulate.run("run", *tables, sample, training="standard")
    best = gather([run]).measured[0].margins
    best = best[best["estimator"] == ENVELOPE]
    assert sorted(best["epoch"].unique()) == list(range(10))
    assert best["distance"].sum() == pytest.approx(0.98 * values.sum())
    run.manifest["estimators"] = [
        {"estimator": text, "name": "w", "parameters": {"warm": warm}} for text, warm in (("w", 3), ("c", 0))
    ]
    content = evaluate([run])
    late = content.verdicts[content.verdicts["claim"] == "late decline"]
    assert set(late["estimator"]) == {"a", "w", ENVELOPE}
    assert content.runs[0].warnings[-2:] == [
        "c: cold sample of its warm form, measured at epochs 0, 1, 5, 9 only",
        "no predictions of whole sets were kept: flow and calibration are those of the probe images",
    ]
