"""The laws of the layout: imports point one way, no circles, one file per estimator, few flat modules."""

import ast
import functools
import graphlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from attacks.registry import ESTIMATORS

ROOT = Path(__file__).resolve().parent.parent
# A room is a folder or a flat module of a package. Each imports only rooms listed before it.
ROOMS = {
    "attacks": (
        *("types", "input_gradient", "geometry", "seeds", "arguments", "trace", "affine", "isolation"),
        *("estimator", "certifier", "pool", "search", "adapters", "registry", "memory", "checks", "judging", "measure"),
        *("certify", "polish", "estimators"),
    ),
    "harness": (
        *("config", "command", "store", "loggers", "tasks", "models", "data", "runs", "training"),
        *("measuring", "statistics", "figures", "workers", "on_ray", "engines", "report", "tracking", "callbacks"),
        *("sweep", "compare", "track"),
    ),
}
# modules that lie in the package's own folder, next to its __init__.py
MOST_FLAT = {"attacks": 15, "harness": 14}


def modules(root: Path, package: str) -> dict[str, Path]:
    """All modules of a package by dotted name; a folder has the name of its ``__init__.py``."""
    paths = sorted((root / package).rglob("*.py"))
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


@functools.cache
def imports(package: str, text: str) -> tuple[tuple[str, str], ...]:
    """(module, name) of every import in the package, also under ``TYPE_CHECKING``; the name may be empty."""
    pairs: list[tuple[str, str]] = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            pairs += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, (parent, node.module)))
            pairs += [(base, alias.name) for alias in node.names]
    return tuple(pairs)


def imported(name: str, path: Path, known: set[str]) -> set[str]:
    """The modules of ``known`` that a module imports at any place."""
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    pairs = imports(package, path.read_text(encoding="utf-8"))
    # `from harness import store` imports a module; `from harness.store import RunFolder` a name of one
    modules = {f"{base}.{part}" if f"{base}.{part}" in known else base for base, part in pairs}
    return modules & known - {name}


def violations(root: Path) -> list[str]:
    """Imports that break a law, one line each."""
    known = {package: modules(root, package) for package in ROOMS}
    every = {name for each in known.values() for name in each}
    lines = []
    for package, rooms in ROOMS.items():
        graph = {name: imported(name, path, every) for name, path in known[package].items() if name != package}
        for name, others in graph.items():
            room = name.split(".")[1]
            for other in sorted(others - set(ROOMS)):
                wrong = other.split(".")[0] == "harness" if package == "attacks" else False
                if other.split(".")[0] == package and room in rooms:
                    wrong = rooms.index(other.split(".")[1]) > rooms.index(room)
                if name.startswith("attacks.estimators.") and other.startswith("attacks.estimators."):
                    wrong = True
                lines += [f"{name} imports {other}"] if wrong else []
            lines += [f"{name} imports harness"] if package == "attacks" and "harness" in others else []
        try:
            list(graphlib.TopologicalSorter(graph).static_order())
        except graphlib.CycleError as error:
            lines.append("circle: " + " - ".join(sorted(set(error.args[1]))))
    return lines


def test_imports_go_one_way() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize("package", ROOMS)
def test_every_module_has_a_room_and_few_are_flat(package: str) -> None:
    found = [path for path in (ROOT / package).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    assert {path.stem for path in found} - {"__init__"} == set(ROOMS[package])
    flat = [path for path in found if path.suffix == ".py" and path.stem != "__init__"]
    assert len(flat) <= MOST_FLAT[package]


def test_estimator_names_match_their_file_names() -> None:
    files = {path.stem for path in (ROOT / "attacks" / "estimators").glob("*.py")} - {"__init__"}
    assert files == set(ESTIMATORS)
    assert {name: entry.target.partition(":")[0] for name, entry in ESTIMATORS.items()} == {
        name: f"attacks.estimators.{name}" for name in ESTIMATORS
    }


@pytest.mark.parametrize(
    ("module", "line", "expected"),
    [
        ("attacks/geometry.py", "import harness.runs", "attacks.geometry imports harness.runs"),
        ("attacks/measure.py", "def f(): from harness import store", "attacks.measure imports harness.store"),
        ("attacks/measure.py", "import harness", "attacks.measure imports harness"),
        (
            "harness/config/options.py",
            "from harness.store import RunFolder",
            "harness.config.options imports harness.store",
        ),
        ("harness/store/folder.py", "from harness import tracking", "harness.store.folder imports harness.tracking"),
        ("harness/data/sources.py", "from ..runs import Run", "harness.data.sources imports harness.runs"),
        ("harness/tracking/tracker.py", "import harness.track", "harness.tracking.tracker imports harness.track"),
        (
            "attacks/estimators/fmn.py",
            "from attacks.estimators.ddn import DDN",
            "attacks.estimators.fmn imports attacks.estimators.ddn",
        ),
        (
            "harness/store/files.py",
            "if TYPE_CHECKING: from harness.store.folder import RunFolder",
            "circle: harness.store.files - harness.store.folder",
        ),
        ("harness/tracking/tracker.py", "import harness.store", None),
    ],
)
def test_a_planted_import_is_detected(tmp_path: Path, module: str, line: str, expected: str | None) -> None:
    for package in ROOMS:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    planted = tmp_path / module
    planted.write_text(planted.read_text(encoding="utf-8") + f"\n\n{line}\n", encoding="utf-8")
    broken = violations(tmp_path)
    assert (expected in broken) if expected else (broken == [])


@pytest.mark.parametrize("foreign", ["attacks.py", "attacks/__init__.py"])
def test_a_foreign_package_with_our_name_is_reported(tmp_path: Path, foreign: str) -> None:
    path = tmp_path / foreign
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import harness"
    # -S: an editable installation would find our modules instead of the foreign package
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"expected margin-harness's package 'attacks', got {path}; " in done.stderr
