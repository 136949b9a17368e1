"""Data flows one way: `attacks` knows nothing of `harness`, and harness modules import only leftwards."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# DESIGN.md, section 3; the last line holds the commands and what only they use
ORDER = [
    *(
        "stopping",
        "command",
        "options",
        "config",
        "existing",
        "devices",
        "identity",
        "places",
        "files",
        "growing",
        "store",
        "rows",
        "units",
        "runs",
        "statistics",
        "data",
        "sources",
        "weights",
        "zoo",
        "models",
        "describing",
        "objectives",
        "training",
        "probes",
        "listening",
        "loggers",
        "measuring",
        "witnesses",
        "tasks",
        "unit_clocks",
        "packing",
        "workers",
        "on_ray",
        "engines",
        "shards",
        "checking",
        "estimating",
        "certifying",
        "tracker",
        "figures",
        "report",
    ),
    *("terminal", "remeasure", "run", "track", "compare", "sweep", "callbacks"),
]


def imported(path: Path, package: str) -> set[str]:
    """Dotted names that a module imports anywhere in it; ``package`` resolves relative imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # one dot is the package itself, two its parent, which is none here
            base = node.module or "" if not node.level else ".".join(filter(None, (package, node.module)))
            # `from harness import store` imports a module as well
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def violations(root: Path) -> list[str]:
    """Imports that go the wrong way, one line each."""
    found = []
    for path in sorted((root / "attacks").rglob("*.py")):
        package = ".".join(path.relative_to(root).parent.parts)
        wrong = {name for name in imported(path, package) if name.partition(".")[0] == "harness"}
        found += [f"{path.relative_to(root)} imports {name}" for name in sorted(wrong)]
    for path in sorted((root / "harness").rglob("*.py")):
        own = path.relative_to(root / "harness").parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        used = {name.split(".")[1] for name in imported(path, "harness") if name.startswith("harness.")}
        for other in sorted(used & set(ORDER) - {own}):
            if own in ORDER and ORDER.index(other) > ORDER.index(own):
                found.append(f"harness/{own} imports harness.{other}")
    return found


def test_imports_go_one_way() -> None:
    assert violations(ROOT) == []


def test_every_harness_module_has_a_place_in_the_order() -> None:
    paths = [path for path in (ROOT / "harness").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    assert {path.name.removesuffix(".py") for path in paths} - {"__init__"} <= set(ORDER)


@pytest.mark.parametrize(
    ("module", "line", "expected"),
    [
        ("attacks/geometry.py", "import harness.store.folder", "attacks/geometry.py imports harness.store.folder"),
        ("attacks/measure.py", "def f(): from harness import store", "attacks/measure.py imports harness"),
        (
            "harness/config/run_config.py",
            "from harness.store.folder import RunFolder",
            "harness/config imports harness.store.folder",
        ),
        ("harness/store/folder.py", "from harness import tracker", "harness/store imports harness.tracking.tracker"),
        ("harness/data/builtin.py", "from . import models", "harness/data imports harness.models.build"),
        ("harness/models/build.py", "from .training import Trainer", "harness/models imports harness.training.trainer"),
        ("harness/tracking/tracker.py", "import harness.track", "harness/tracker imports harness.track"),
        ("harness/tracking/tracker.py", "import harness.store.folder", None),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, module: str, line: str, expected: str | None) -> None:
    for package in ("attacks", "harness"):
        shutil.copytree(ROOT / package, tmp_path / package)
    planted = tmp_path / module
    planted.write_text(planted.read_text(encoding="utf-8") + f"\n\n{line}\n", encoding="utf-8")
    found = violations(tmp_path)
    assert (expected in found) if expected else (found == [])


@pytest.mark.parametrize("foreign", ["attacks.py", "attacks/__init__.py"])
def test_a_foreign_package_of_our_name_is_named(tmp_path: Path, foreign: str) -> None:
    path = tmp_path / foreign
    path.parent.mkdir(exist_ok=True)
    path.write_text("")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import harness"
    # -S: an editable installation would find our modules in the foreign package's stead
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert f"expected margin-harness's package 'attacks', got {path}; " in done.stderr
