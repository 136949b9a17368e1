"""docs/adding.md: each part on the page is added to a copy of the packages as described there, and used.

Also the requirements for each registered certifier, engine, data source and model source, one row each.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from attacks import Certifier, Status, create_certifier
from attacks.registry import CERTIFIERS
from attacks.types import Norm
from harness import MarginTracker, RunFolder, measure, read_run
from harness.config.registry import DATASETS, ENGINES, LIBRARIES, LOGGERS, MODELS, SOURCES, definition
from harness.config.run_config import RunConfig
from harness.data.load import load_data
from harness.engines import create_engine
from harness.models.build import build
from harness.report.figures.index import graphs
from harness.report.static import FIGURES
from harness.store.tables import read_part
from harness.track import main
from tests import oracles, pages
from tests.test_conformance import assert_conforms

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "adding.md"
SECTIONS = [
    *("Estimator", "Certifier", "Engine", "Data source", "Model source", "Logger", "Figure, static"),
    *("Figure, interactive", "Statistic"),
]
PLACE = re.compile(r"# (?P<path>[\w/.]+\.py)(: \"?(?P<table>\w+)\"?)?$")
SHAPE = (1, 8, 8)

# The requirements for each registered part, one row per part.

# certifier -> norm -> required median of lower bound / exact margin on affine models
PROVED: dict[str, dict[Norm, float]] = {
    "crown": {"l2": 0.999, "linf": 0.999},
    "ibp": {"l2": 0.999, "linf": 0.999},
    "exact": {"l2": 0.999, "linf": 0.999},
}
# engines whose rows must equal those of `InProcess`; Ray is an optional extra with its own tests
SAME_ROWS = [
    "local",
]
# data set -> classes, shape of an image, training and test images; the others need files and have their own tests
DATA: dict[str, tuple[int, tuple[int, int, int], int, int]] = {
    "digits": (10, (1, 8, 8), 1397, 400),
}
# model -> parameters for 10 classes and 8x8 grey pixels, of torchvision 32x32 colours; see `test_models` for others
PARAMETERS: dict[str, int] = {
    "dense": 8970,
    "cnn": 18710,
    "torchvision:shufflenet_v2_x0_5": 352042,
}


def assert_proves(certifier: Certifier, norm: Norm, least: float) -> None:
    """Lower bounds of an affine model are below its exact margins and close to them."""
    truth = oracles.affine(10).head(4)
    exact = truth.exact[norm]
    certified = certifier.certify(
        truth.model, truth.images, norm, domain="box", upper=torch.full_like(exact, torch.inf)
    )
    assert torch.equal(certified.label, truth.model(truth.images).argmax(1))
    assert (certified.lower <= exact).all(), (
        f"lower bounds up to {(certified.lower / exact).max():.4f} times the exact margin"
    )
    assert (certified.lower / exact).median() >= least


@pytest.mark.parametrize(("text", "norm"), [(text, norm) for text, norms in PROVED.items() for norm in norms])
def test_certifiers_prove_affine_margins(text: str, norm: Norm) -> None:
    assert_proves(create_certifier(text), norm, PROVED[text][norm])


def rows_by(folder: Path, engine: str) -> dict[str, list[dict[str, Any]]]:
    """The rows of a network's margins without the seconds, by part."""
    truth = oracles.affine(10).head(6)
    probes = {"test": (truth.images, torch.zeros(6, dtype=torch.int64))}
    tracker = MarginTracker(
        folder, probes, ["linear", "fmn:steps=3"], ["l2"], engine=create_engine(engine, 0, torch.device("cpu"))
    )
    tracker.update(0, truth.model)
    tracker.close()
    parts = RunFolder(folder).margin_parts()
    return {part.name: read_part(part)[0].drop(columns="seconds").fillna(-1.0).to_dict("records") for part in parts}


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
    # torchvision's networks take three channels
    shape = (3, 32, 32) if text.startswith("torchvision") else (1, 8, 8)
    weights = [torch.cat([p.detach().flatten() for p in build(text, shape, 10, seed=0).parameters()]) for _ in range(2)]
    assert len(weights[0]) == PARAMETERS[text]
    assert torch.equal(*weights)


def test_rows_cover_the_registries() -> None:
    assert set(PROVED) == set(CERTIFIERS)
    assert set(SAME_ROWS) == set(ENGINES) - {"ray"}
    assert {text.partition(":")[0] for text in DATA} >= set(DATASETS | SOURCES) - {
        *("mnist", "fashion-mnist", "cifar10", "npz", "folder", "torchvision")
    }
    assert {text.partition(":")[0] for text in PARAMETERS} == set(MODELS | LIBRARIES) - {
        *("resnet18", "timm", "robustbench")
    }


@pytest.mark.parametrize("table", [DATASETS, SOURCES, MODELS, LIBRARIES, ENGINES, LOGGERS])
def test_every_registry_entry_resolves(table: dict[str, Any]) -> None:
    assert all(callable(definition(entry)) for entry in table.values())


# The page.


def blocks(section: str) -> list[str]:
    return re.findall(r"^```(?:python|text)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def sections() -> dict[str, str]:
    parts = re.split(r"^## (.+)\n", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def write_block(root: Path, block: str) -> str:
    """Write a block to the path in its first line, as a new file or appended to a table; return the path."""
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
    """A copy of the packages and tests with all parts of the page, after ``changes`` to the page's text."""
    for package in ("attacks", "harness", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "corpus")
        shutil.copytree(ROOT / package, root / package, ignore=ignored)
    text = PAGE.read_text(encoding="utf-8")
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    (root / "docs").mkdir()
    (root / "docs" / PAGE.name).write_text(text, encoding="utf-8")
    for block in blocks(text):
        write_block(root, block)
    return root


def use() -> None:
    """In the copy: use every part through the public interface and write the results to result.json."""
    torch.set_num_threads(1)
    run = Path("run")
    options = ["--dataset", "blobs:3", "--model", "mlp:16x2", "--engine", "cpu", "--log", "csv:averages.csv"]
    options += ["--estimator", "straight", "--estimator", "linear", "--certify", "lipschitz", "--certify-probe", "5"]
    options += ["--norm", "l2", "--epochs", "1", "--probe", "10", "--device", "cpu", "--out", str(run), "--no-report"]
    assert main(options) == 0
    read = read_run(run)
    rows = read.margins[(read.margins["estimator"] == "straight") & (read.margins["epoch"] == 1)]
    summary = pd.read_csv(run / "summary.csv")
    whole = summary[summary["subset"] == "all"]
    content = pages.report(pages.run(epochs=range(2), images=20))
    (graph,) = (one for one in graphs(content) if one.name == "robustness")
    drawn = content.runs[0].margins.query("epoch == 1 and split == 'test' and norm == 'l2'")
    example: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(compile(blocks(sections()["Estimator"])[-1], str(PAGE), "exec"), example)
    figure = FIGURES["robustness"](content.runs[0], "envelope", "test")
    assert isinstance(figure, Figure)
    result = {
        "ratio": example["ratio"].tolist(),
        "distance": rows["distance"].tolist(),
        "beyond": whole.loc[(whole["estimator"] == "straight") & (whole["epoch"] == 1), "beyond"].tolist(),
        "logged": list(csv.reader(Path("averages.csv").read_text(encoding="utf-8").splitlines())),
        "averages": whole[["epoch", "split", "estimator", "norm", "avg"]].to_numpy().tolist(),
        "bounds": read.bounds[["certifier", "lower", "upper"]].to_numpy().tolist(),
        "curves": [line.get_xydata().tolist() for line in figure.axes[0].get_lines()],  # type: ignore[union-attr]
        "drawn": {str(name): sorted(rows["distance"]) for name, rows in drawn.groupby("estimator", sort=False)},
        "traces": {trace.plotly["name"]: [trace.plotly["x"], trace.plotly["y"]] for trace in graph.panels[0].traces},
        "graphs": [one.name for one in graphs(content)] == pages.FIGURES,
        "dataset": read.manifest["fingerprint"]["dataset"],
        "help": [RunConfig.__dataclass_fields__[name].metadata["about"] for name in ("dataset", "model", "log")],
    }
    Path("result.json").write_text(json.dumps(result), encoding="utf-8")


def check_rows() -> None:
    """In the copy: the parts meet the requirements of the page's rows."""
    from tests import test_conformance, test_figures, test_imports, test_statistics

    test_conformance.test_table_covers_the_registry()
    test_conformance.test_registry_states_what_the_class_can_do("straight")
    test_conformance.test_declared_limits_are_within_the_contract("straight")
    test_conformance.test_affine("straight", "l2", "ten")
    test_conformance.test_affine_where_the_box_binds("straight", "l2", "ten")
    test_certifiers_prove_affine_margins("lipschitz", "l2")
    test_engines_give_the_same_rows(Path("engines"), "cpu")
    test_data_sources_give_the_same_images_every_time("blobs:3")
    test_model_sources_give_the_same_network_for_a_seed("mlp:64x3")
    test_rows_cover_the_registries()
    test_figures.test_empty_tables_give_one_sentence("robustness_curves")
    test_figures.test_no_text_is_too_small_to_read("robustness_curves")
    test_statistics.test_the_columns_start_with_the_documented_ones_in_order()
    test_statistics.test_a_summary_matches_hand_calculation()
    assert test_imports.violations(Path()) == []
    test_imports.test_estimator_names_match_their_file_names()
    test_imports.test_every_module_has_a_room_and_few_are_flat("harness")


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with all parts, after `use` and `check_rows`."""
    root = copied(tmp_path_factory.mktemp("extended"))
    command = [sys.executable, "-c", "from tests import test_adding as t; t.use(); t.check_rows()"]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return root


@pytest.fixture(scope="module")
def result(extended: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((extended / "result.json").read_text(encoding="utf-8"))
    return content


def test_there_is_a_section_for_every_extension_point() -> None:
    assert list(sections()) == SECTIONS


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_names_a_file_a_line_a_row_and_a_page(section: str) -> None:
    text = sections()[section]
    places = [place for block in blocks(text) if (place := PLACE.fullmatch(block.split("\n", 1)[0]))]
    new = [place["path"] for place in places if not (ROOT / place["path"]).exists()]
    tables = [place["path"] for place in places if place["table"] and not place["path"].startswith("tests/")]
    tests = [place["path"] for place in places if place["table"] and place["path"].startswith("tests/")]
    assert (len(new), len(tables)) == (1, 1)
    assert [path for path in tests if path != "tests/test_imports.py"] or section == "Logger"
    documented = re.search(r"^Documentation: .*", text, re.MULTILINE)
    assert documented is not None
    pages = re.findall(r"\]\(([\w/]+\.md)(?:#[\w-]+)?\)", documented[0])
    assert pages
    assert all((PAGE.parent / page).exists() for page in pages)


def test_the_estimator_of_the_page_is_near_the_exact_margin(result: dict[str, Any]) -> None:
    assert len(result["ratio"]) == 8
    assert 1 - 1e-5 <= min(result["ratio"]) <= np.median(result["ratio"]) < 1.001


def test_the_certifier_of_the_page_is_below_every_witness(result: dict[str, Any]) -> None:
    # two epochs, two splits, five images
    assert len(result["bounds"]) == 20
    assert all(name == "lipschitz" and 0 < lower < upper for name, lower, upper in result["bounds"])


def test_the_sources_of_the_page_are_named_by_help(result: dict[str, Any]) -> None:
    assert result["dataset"] == "blobs:3"
    dataset, model, log = result["help"]
    assert "torchvision:NAME or blobs:CLASSES" in dataset
    assert "mlp:WIDTHxDEPTH or pkg.module:factory" in model
    assert "mlflow:URI or csv:FILE" in log


def test_the_logger_of_the_page_got_the_averages(result: dict[str, Any]) -> None:
    logged = {(int(epoch), name): float(value) for epoch, name, value in result["logged"]}
    assert len(logged) == 8
    averages = {(e, f"margin/{split}/{name}/{norm}"): avg for e, split, name, norm, avg in result["averages"]}
    assert logged == averages


def test_the_figures_of_the_page_hold_the_shares(result: dict[str, Any]) -> None:
    assert result["graphs"]
    assert list(result["drawn"]) == ["deepfool", "fmn:steps=20", "envelope"]
    for (name, distances), curve in zip(result["drawn"].items(), result["curves"], strict=True):
        found = [distance for distance in distances if np.isfinite(distance)]
        shares = 1 - np.arange(1, len(found) + 1) / len(found)
        assert np.array(curve) == pytest.approx(np.stack([found, shares], axis=1))
        radii, percents = result["traces"][f"{name}, test"]
        assert radii == pytest.approx(found)
        assert percents == pytest.approx(100 * shares)


def test_the_statistic_of_the_page_is_a_column(result: dict[str, Any]) -> None:
    distance = np.array(result["distance"]).reshape(2, 10)
    assert sorted(result["beyond"]) == sorted((distance > 8 / 255).mean(axis=1))


# Planted faults: the same blocks with one error each.


def planted(section: str, name: str, old: str, new: str) -> Any:
    """The class of a section's first block, with a change."""
    block = blocks(sections()[section])[0]
    assert block.count(old) == 1
    names: dict[str, Any] = {"__name__": "planted"}
    sys.modules["planted"] = types.ModuleType("planted")
    sys.modules["planted"].__dict__.update(names)
    exec(compile(block.replace(old, new), "planted", "exec"), sys.modules["planted"].__dict__)
    return getattr(sys.modules["planted"], name)()


def test_the_estimator_of_the_page_conforms_in_this_process() -> None:
    estimator = planted("Estimator", "Straight", "return proposed", "return proposed")
    assert_conforms(estimator, oracles.affine(10), "l2", (1.05, 1.25))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # no witness
        ("return proposed", "return images"),
        # witnesses of other images
        ("return proposed", "return proposed.roll(1, 0)"),
        # away from the boundary
        ("* 1.1**step * direction", "* -(1.1**step) * direction"),
        # a direction without a gradient
        ("* 1.1**step * direction", "* 1.1**step * torch.randn_like(direction)"),
    ],
)
def test_a_wrong_estimator_fails_its_row(old: str, new: str) -> None:
    with pytest.raises(AssertionError, match=r"found|median"):
        assert_conforms(planted("Estimator", "Straight", old, new), oracles.affine(10), "l2", (1.05, 1.25))


def test_a_wrong_witness_gives_no_distance() -> None:
    truth = oracles.affine(10).head(4)
    margins = measure(
        truth.model,
        truth.images,
        planted("Estimator", "Straight", "return proposed", "return images"),
        "l2",
        noise_retries=0,
    )
    assert margins.status == (Status.NOT_FOUND,) * 4
    assert margins.distance.isinf().all()


def test_an_unsound_certifier_fails_its_row() -> None:
    assert_proves(planted("Certifier", "Lipschitz", "1 - 1e-6", "1 - 1e-6"), "l2", 0.2)
    with pytest.raises(AssertionError, match="times the exact margin"):
        assert_proves(planted("Certifier", "Lipschitz", "1 - 1e-6", "8.0"), "l2", 0.2)


def test_a_line_without_its_table_is_detected(tmp_path: Path) -> None:
    (tmp_path / "table.py").write_text("TABLE = {\n    1: 2,\n}\nOTHER = [\n    3,\n]\n", encoding="utf-8")
    write_block(tmp_path, "# table.py: OTHER\n4,\n")
    assert (tmp_path / "table.py").read_text(encoding="utf-8").endswith("OTHER = [\n    3,\n    4,\n]\n")
    with pytest.raises(AssertionError, match="has no table GONE"):
        write_block(tmp_path, "# table.py: GONE\n4,\n")
