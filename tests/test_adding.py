"""docs/adding.md: each part on the page is added to a copy of the packages as the page says, and used there.

Also the rows of certifiers, engines, data sources and model sources: what each registered one is held to.
"""

from __future__ import annotations

import ast
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from attacks import Certifier, create_certifier
from attacks.registry import CERTIFIERS, ESTIMATORS
from attacks.types import Norm
from harness import MarginTracker, RunFolder, read_run
from harness.config.registry import DATASETS, ENGINES, LIBRARIES, LOGGERS, MODELS, SOURCES, definition
from harness.config.run_config import RunConfig
from harness.data.load import load_data
from harness.engines import create_engine
from harness.models.build import build
from harness.report.figures.index import BUILDERS
from harness.report.static import FIGURES
from harness.statistics.averages import STATISTICS
from harness.store.files import read_part
from harness.track import main
from tests import oracles

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "adding.md"
SECTIONS = [
    *("Estimator", "Certifier", "Engine", "Data source", "Model source", "Logger", "Figure, static"),
    *("Figure, interactive", "Statistic"),
]
PLACE = re.compile(r"# (?P<path>[\w/.]+\.py)(: \"?(?P<table>\w+)\"?)?$")
SHAPE = (1, 8, 8)

# What each registered part is held to. A part joins by a row.

# certifier -> norm -> least median of lower bound / exact margin on affine models
PROVED: dict[str, dict[Norm, float]] = {
    "crown": {"l2": 0.999, "linf": 0.999},
    "ibp": {"l2": 0.999, "linf": 0.999},
    "exact": {"l2": 0.999, "linf": 0.999},
}
# engines whose rows are those of `InProcess`; Ray is an extra, with tests of its own
SAME_ROWS = [
    "local",
]
# data set -> classes, shape of an image, training and test images; the others need files, and have tests of their own
DATA: dict[str, tuple[int, tuple[int, int, int], int, int]] = {
    "digits": (10, (1, 8, 8), 1397, 400),
}
# model -> parameters for 8x8 grey pixels and 10 classes; timm and RobustBench are extras, with tests of their own
PARAMETERS: dict[str, int] = {
    "dense": 8970,
    "cnn": 18350,
    "resnet18": 11172810,
    "torchvision:squeezenet1_1": 727626,
}


def assert_proves(certifier: Certifier, norm: Norm, least: float) -> None:
    """Lower bounds of an affine model are below its exact margins, and not by much."""
    truth = oracles.affine(10).head(8)
    exact = truth.exact[norm]
    found = certifier.certify(truth.model, truth.images, norm, domain="box", upper=torch.full_like(exact, torch.inf))
    assert torch.equal(found.label, truth.model(truth.images).argmax(1))
    assert (found.lower <= exact).all(), f"lower bounds up to {(found.lower / exact).max():.4f} times the exact margin"
    assert (found.lower / exact).median() >= least


@pytest.mark.parametrize(("text", "norm"), [(text, norm) for text, norms in PROVED.items() for norm in norms])
def test_certifiers_prove_affine_margins(text: str, norm: Norm) -> None:
    assert_proves(create_certifier(text), norm, PROVED[text][norm])


def rows_by(folder: Path, engine: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of a network's margins, but for the seconds, by part."""
    truth = oracles.affine(10).head(6)
    probes = {"test": (truth.images, torch.zeros(6, dtype=torch.int64))}
    tracker = MarginTracker(
        folder, probes, ["linear", "fmn:steps=3"], ["l2"], engine=create_engine(engine, 0, torch.device("cpu"))
    )
    tracker.update(0, truth.model)
    tracker.close()
    parts = RunFolder(folder).margin_parts()
    return {part.name: read_part(part)[0].drop(columns="seconds").to_dict("records") for part in parts}


@pytest.mark.parametrize("name", SAME_ROWS)
def test_engines_give_the_same_rows(tmp_path: Path, name: str) -> None:
    expected = rows_by(tmp_path / "local", "local")
    assert [len(rows) for rows in expected.values()] == [6, 6]
    assert rows_by(tmp_path / "other", name) == expected


@pytest.mark.parametrize("text", DATA)
def test_data_sources_give_the_same_images_every_time(text: str) -> None:
    first, again = (load_data(RunConfig(dataset=text)) for _ in range(2))
    assert (first.classes, first.shape, len(first.train), len(first.test)) == DATA[text]
    assert first.train.labels.unique().tolist() == list(range(first.classes))
    assert first.checksums == again.checksums
    assert torch.equal(first.test.images, again.test.images)


@pytest.mark.parametrize("text", PARAMETERS)
def test_model_sources_give_the_same_network_for_a_seed(text: str) -> None:
    channels = 3 if text.startswith("torchvision") else 1
    shape = (3, 32, 32) if text.startswith("torchvision") else (channels, 8, 8)
    one, same, other = (build(text, shape, 10, seed) for seed in (0, 0, 1))
    weights = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (one, same, other)]
    assert len(weights[0]) == PARAMETERS[text]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_rows_cover_the_registries() -> None:
    assert set(PROVED) == set(CERTIFIERS)
    assert set(SAME_ROWS) == set(ENGINES) - {"ray"}
    assert {text.partition(":")[0] for text in DATA} >= set(DATASETS | SOURCES) - {
        *("mnist", "fashion-mnist", "cifar10", "npz", "folder", "torchvision")
    }
    assert {text.partition(":")[0] for text in PARAMETERS} == set(MODELS | LIBRARIES) - {"timm", "robustbench"}


@pytest.mark.parametrize("table", [DATASETS, SOURCES, MODELS, LIBRARIES, ENGINES, LOGGERS])
def test_every_entry_names_something(table: dict[str, Any]) -> None:
    assert all(callable(definition(entry)) for entry in table.values())


# The page.


def blocks(section: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def sections() -> dict[str, str]:
    parts = re.split(r"^## (.+)\n", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def put(root: Path, block: str) -> str:
    """Write a block where its first line says: a new file, or lines at the end of a table; returns the path."""
    first, rest = block.split("\n", 1)
    place = PLACE.fullmatch(first)
    if place is None:
        return ""
    path = root / place["path"]
    if not path.exists():
        assert place["table"] is None, f"{path} is not there"
        path.write_text(rest, encoding="utf-8")
        return place["path"]
    *imports, rows = re.split(r"\n\n(?=[^\n])", rest) if place["table"] else (rest,)
    if place["table"] is None:
        imports, rows = [rows], ""
    text = path.read_text(encoding="utf-8")
    if rows:
        opening = re.search(rf'^( *)("{place["table"]}": |{place["table"]}\b[^\n]*= )[\[{{(]$', text, re.MULTILINE)
        assert opening is not None, f"{place['path']} has no table {place['table']}"
        closing = re.compile(rf"^{opening[1]}[\]}})]", re.MULTILINE).search(text, opening.end())
        assert closing is not None
        lines = "".join(f"{opening[1]}    {line}\n" for line in rows.splitlines())
        text = text[: closing.start()] + lines + text[closing.start() :]
    for line in imports:
        position = re.search(r"^(from|import) (?!__future__)", text, re.MULTILINE)
        assert position is not None
        text = text[: position.start()] + line.rstrip() + "\n" + text[position.start() :]
    path.write_text(text, encoding="utf-8")
    return place["path"]


def copied(root: Path, *changes: tuple[str, str]) -> Path:
    """A copy of the packages and tests with all parts of the page; ``changes`` are made to its text first."""
    for package in ("attacks", "harness", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "corpus")
        shutil.copytree(ROOT / package, root / package, ignore=ignored)
    text = PAGE.read_text(encoding="utf-8")
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    for block in blocks(text):
        put(root, block)
    return root


def run_in(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", *arguments]
    return subprocess.run(
        command, cwd=root, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(root)}, timeout=300
    )


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copied(tmp_path_factory.mktemp("extended"))


def use() -> None:
    """In the copy: use every part through the public interface, and print what came out as JSON."""
    run = Path("run")
    options = ["--dataset", "blobs:3", "--model", "mlp:16x2", "--engine", "cpu", "--log", "csv:averages.csv"]
    options += ["--estimator", "straight", "--estimator", "deepfool", "--certify", "lipschitz", "--certify-probe", "10"]
    options += ["--norm", "l2", "--epochs", "2", "--probe", "20", "--device", "cpu", "--out", str(run)]
    assert main(options) == 0
    margins = read_run(run).margins
    by_estimator = margins[margins["split"] == "test"].pivot(index=["epoch", "image"], columns="estimator")["distance"]
    summary = pd.read_csv(run / "summary.csv")
    row = summary[(summary["epoch"] == 2) & (summary["estimator"] == "straight") & (summary["subset"] == "all")]
    rows = margins[(margins["epoch"] == 2) & (margins["estimator"] == "straight")]
    bounds = read_run(run).bounds
    page = (run / "report.html").read_text(encoding="utf-8")
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    example: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(compile(blocks(sections()["Estimator"])[-1], str(PAGE), "exec"), example)
    with Path("averages.csv").open(encoding="utf-8", newline="") as file:
        logged = {(int(epoch), name): float(value) for epoch, name, value in csv.reader(file)}
    averages = summary[summary["subset"] == "all"].set_index(["epoch", "split", "estimator", "norm"])["avg"]
    result = {
        "ratio": example["ratio"].tolist(),
        "straight over deepfool": (by_estimator["straight"] / by_estimator["deepfool"]).tolist(),
        "beyond": row.set_index("split")["beyond"].to_dict(),
        "beyond by hand": {split: np.mean(one["distance"] > 8 / 255) for split, one in rows.groupby("split")},
        "logged": {f"{epoch} {name}": value for (epoch, name), value in logged.items()},
        "averages": {f"{e} margin/{s}/{est}/{norm}": avg for (e, s, est, norm), avg in averages.items()},
        "bounds": bounds[["certifier", "lower", "upper"]].to_dict("list"),
        "graph": page.count('id="figure-robustness"') + page.count('data-figure="robustness"'),
        "files": sorted(path.name for path in (run / "figures").glob("robustness.*")),
        "images": manifest["fingerprint"]["dataset"],
        "parameters": sum(p.numel() for p in build("mlp:16x2", SHAPE, 3, 0).parameters()),
        "help": subprocess.run(
            [sys.executable, "-m", "harness.track", "--help"], capture_output=True, text=True, check=True
        ).stdout,
    }
    print("RESULT" + json.dumps(result))


@pytest.fixture(scope="module")
def result(extended: Path) -> dict[str, Any]:
    done = run_in(extended, "-c", "from tests.test_adding import use; use()")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.partition("RESULT")[2])
    return found


def test_there_is_a_section_for_every_extension_point() -> None:
    assert list(sections()) == SECTIONS
