"""The commands `benchmarks.estimators` and `benchmarks.published`, and the problems with exact margins."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from attacks import create
from attacks.measure import measure
from attacks.registry import create_certifier
from attacks.types import NORMS, Norm
from benchmarks import estimators as benchmark
from benchmarks import published
from benchmarks.problems import slab_problem


def test_ratios_are_to_the_exact_margin() -> None:
    rows = benchmark.compare(benchmark.affine_problem(16, boxed=False), ["deepfool", "fmn"])
    assert [(row.estimator, row.norm) for row in rows] == [
        ("deepfool", "l2"),
        ("fmn", "l2"),
        ("deepfool", "linf"),
        ("fmn", "linf"),
    ]
    exact, runner_up = rows[0], rows[1]
    assert exact.found == 1.0
    assert 1.0 < exact.worst < 1.001
    # control: fmn follows the runner-up class, which is not always the nearest class on this problem
    assert runner_up.worst > 1.05
    assert exact.forwards == pytest.approx(20)
    # one per other class, and one at the point where the class has changed
    assert exact.backwards == pytest.approx(9 + 1)


def test_statistics_of_no_images_are_nan() -> None:
    problem = benchmark.affine_problem(4, boxed=False)
    _, bias = problem.model.parameters()
    bias.data[0] += 1e6  # no other class is reachable in the box
    rows = benchmark.compare(problem, ["deepfool:steps=3"])
    assert [row.found for row in rows] == [0.0, 0.0]
    assert all(math.isnan(row.median) and math.isnan(row.within_1_percent) for row in rows)


def test_the_command_prints_a_table_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "digits_problem", lambda images, epochs: benchmark.affine_problem(images, False))
    threads = torch.get_num_threads()
    try:
        benchmark.main(["--images", "8", "--estimator", "deepfool", "--out", str(tmp_path / "table.json")])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("| problem | estimator | norm | found |")
    assert len(printed) == 2 + 3 * 2
    written = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    assert len(written["rows"]) == 6
    assert written["rows"][0]["median"] == pytest.approx(1.0001, abs=1e-4)
    assert written["versions"]["torch"] == torch.__version__.partition("+")[0]


@pytest.mark.parametrize(
    ("option", "words"),
    [(["--estimator", "deepfol"], "did you mean 'deepfool'?"), (["--images", "0"], "of at least 1, got less")],
)
def test_bad_options_give_a_one_line_error(option: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(option)
    assert stopped.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.count("\n") == 1
    assert words in stderr


@pytest.mark.parametrize("norm", NORMS)
def test_margins_of_the_slab_are_those_to_the_nearer_plane(norm: Norm) -> None:
    problem = slab_problem(48)
    assert problem.exact is not None
    truth = problem.exact(norm).margin
    inside = problem.probe.labels == 0
    assert 0.4 < inside.double().mean() < 0.6
    found = measure(problem.model, problem.images, create("cascade:budget=100"), norm).distance / truth
    assert found.min() >= 1 - 1e-5
    assert found.quantile(0.9) <= 1.001
    # control: other images have other margins
    moved = measure(problem.model, 0.9 * problem.images, create("cascade:budget=100"), norm).distance / truth
    assert (moved - 1).abs().median() > 0.05


@pytest.fixture
def networks(tmp_path: Path) -> Path:
    """A random network and eight random images, two of them misclassified, in the files of a published one."""
    torch.manual_seed(0)
    network = published.NETWORKS["mnist-cnn-a-adv"].network()
    save_file(network.state_dict(), tmp_path / "mnist-cnn-a-adv.safetensors")
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (8, 1, 28, 28), dtype=np.uint8)
    # the first two labels are wrong
    labels = network(torch.from_numpy(images).float() / 255).argmax(1).numpy()
    labels[:2] = (labels[:2] + 1) % 10
    np.savez(tmp_path / "mnist-200.npz", x_test=images, y_test=labels)
    return tmp_path


def test_published_networks_are_counted_at_their_radius(
    networks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images, labels = published.read(published.NETWORKS["mnist-cnn-a-adv"], networks, None)
    margins = measure(model, images[:6], create("deepfool:steps=5"), "linf")
    wrong = margins.prediction != labels[:6]
    assert wrong.tolist() == [True, True] + [False] * 4
    radius = float(margins.distance[2:].median())
    monkeypatch.setitem(
        published.NETWORKS, "mnist-cnn-a-adv", replace(published.NETWORKS["mnist-cnn-a-adv"], radius=radius)
    )
    options = ["--networks", str(networks), "--network", "mnist-cnn-a-adv", "--estimator", "deepfool:steps=5"]
    out = networks / "out.json"
    assert published.main([*options, "--certifier", "ibp", "--images", "6", "--out", str(out)]) == 0
    assert capsys.readouterr().out == out.with_suffix(".md").read_text(encoding="utf-8")
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    # two errors, and of the other four the two nearest
    assert (rows[0]["images"], rows[0]["errors"], rows[0]["within"]) == (6, 2, 4)
    assert rows[0]["passes"] == float((margins.forwards + margins.backwards).mean())
    far = ~wrong & (margins.distance > radius)
    upper = margins.distance[far]
    lower = create_certifier("ibp").certify(model, images[:6][far], "linf", domain="box", upper=upper).lower
    assert (rows[1]["method"], rows[1]["left"], rows[1]["passes"]) == ("ibp", 2, None)
    assert rows[1]["within"] == 6 - int((lower >= radius).sum())


def test_more_images_than_an_exact_number_is_a_contradiction(networks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--networks", str(networks), "--network", "mnist-cnn-a-adv", "--estimator", "deepfool:steps=5"]
    for within, code in ((8, 0), (-1, 1)):
        known = replace(published.NETWORKS["mnist-cnn-a-adv"], within=within, count=8)
        monkeypatch.setitem(published.NETWORKS, "mnist-cnn-a-adv", known)
        assert published.main(options) == code


@pytest.mark.parametrize("damage", ["mnist-cnn-a-adv.safetensors", "mnist-200.npz"])
def test_a_missing_or_damaged_network_is_one_line(
    networks: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (networks / damage).write_bytes(b"x")
    assert published.main(["--networks", str(networks), "--network", "mnist-cnn-a-adv"]) == 2
    assert re.fullmatch(rf"published: error: expected .* at .*{damage}, got .*; download it\n", capsys.readouterr().err)
