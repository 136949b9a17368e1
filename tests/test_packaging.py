"""The files that describe the package agree with each other and with the folders.

Installed packages are not checked: a machine with a GPU may have another version of torch.
"""

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from setuptools import find_packages

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PYPROJECT: dict[str, Any] = tomllib.loads(TEXT)
PINS = {
    canonicalize_name(pin.name): pin for pin in map(Requirement, PYPROJECT["tool"]["uv"]["constraint-dependencies"])
}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def direct_requirements() -> list[Requirement]:
    """The project's direct requirements: dependencies, extras and dependency groups."""
    project = PYPROJECT["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    lists += PYPROJECT["dependency-groups"].values()
    # a group may include another: {include-group = "..."}
    return [Requirement(entry) for entries in lists for entry in entries if isinstance(entry, str)]


def pinned_version(name: str) -> str:
    (only,) = PINS[canonicalize_name(name)].specifier
    assert only.operator == "=="
    return only.version


def test_every_constraint_is_one_exact_version() -> None:
    pins = PYPROJECT["tool"]["uv"]["constraint-dependencies"]
    assert pins == sorted(pins)
    assert len(PINS) == len(pins)
    assert [pin for pin in pins if not re.fullmatch(r"[a-z0-9-]+==[a-z0-9.!+]+", pin)] == []


@pytest.mark.parametrize("requirement", direct_requirements(), ids=str)
def test_a_direct_dependency_has_a_version_that_it_allows(requirement: Requirement) -> None:
    assert canonicalize_name(requirement.name) in PINS, "add the tested version to constraint-dependencies"
    assert requirement.specifier.contains(pinned_version(requirement.name))


def test_requests_overrides_the_pin_of_torchattacks() -> None:
    overrides = [Requirement(entry) for entry in PYPROJECT["tool"]["uv"]["override-dependencies"]]
    (requests,) = [entry for entry in overrides if entry.name == "requests"]
    assert not requests.specifier.contains("2.32.5")
    assert requests.specifier.contains(pinned_version("requests"))


def test_gitpython_has_a_floor() -> None:
    (gitpython,) = [entry for entry in direct_requirements() if canonicalize_name(entry.name) == "gitpython"]
    assert not gitpython.specifier.contains("3.1.99")


def test_every_folder_with_modules_is_found_as_a_package() -> None:
    # a folder without __init__.py works in the checkout and is missing from a built package
    folders = {module.parent for top in ("attacks", "harness") for module in (ROOT / top).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    packages = find_packages(str(ROOT), include=PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"])
    assert set(packages) == names


def test_the_listed_data_files_are_those_in_the_packages() -> None:
    patterns: dict[str, list[str]] = PYPROJECT["tool"]["setuptools"]["package-data"]
    listed = set()
    for package, globs in patterns.items():
        folder = ROOT.joinpath(*package.split("."))
        for glob in globs:
            matches = set(folder.glob(glob))
            assert matches, f"{package}: nothing is called {glob}"
            listed |= matches
    inside = {path for top in ("attacks", "harness") for path in (ROOT / top).rglob("*") if path.is_file()}
    data = {path for path in inside if path.suffix != ".py" and "__pycache__" not in path.parts}
    assert listed == data


def test_uv_lock_is_ignored_and_not_tracked() -> None:
    # a lock file names its package index, and the constraints already fix the versions
    assert "uv.lock" in read(".gitignore").splitlines()
    if not (ROOT / ".git").exists():
        return
    tracked = subprocess.run(["git", "ls-files", "*uv.lock"], cwd=ROOT, capture_output=True, text=True)
    assert tracked.stdout == ""


def test_citation_names_the_software_and_the_paper() -> None:
    citation = read("CITATION.cff")
    keys = re.findall(r"^([a-z-]+):", citation, re.MULTILINE)
    assert len(keys) == len(set(keys))
    assert {"cff-version", "message", "title", "authors", "version", "references"} <= set(keys)
    assert "\t" not in citation
    assert "Understanding the Decision Boundary of Deep Neural Networks: An Empirical Study" in citation
    assert "arXiv:2002.01810" in citation
    for author in ("Mickisch", "Assion", "Greßner", "Günther", "Motta"):
        assert f"family-names: {author}\n" in citation


def test_the_version_and_date_are_the_same_everywhere() -> None:
    citation = dict(re.findall(r"^(version|date-released): (\S+)$", read("CITATION.cff"), re.MULTILINE))
    # the first heading with a date is the newest release; an [Unreleased] section above it has none
    newest = re.search(r"^## \[(.+?)\] - (\d{4}-\d{2}-\d{2})$", read("CHANGELOG.md"), re.MULTILINE)
    assert newest is not None
    assert newest.groups() == (citation["version"], citation["date-released"])
    assert PYPROJECT["project"]["version"] == citation["version"]


@pytest.mark.parametrize(
    "name",
    [".pre-commit-config.yaml", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / ".github").rglob("*.yml")))],
)
def test_files_for_other_tools_are_valid_yaml(name: str) -> None:
    assert isinstance(yaml.safe_load(read(name)), dict)


def test_the_workflow_runs_the_test_command_on_every_python() -> None:
    jobs = yaml.safe_load(read(".github/workflows/tests.yml"))["jobs"]
    versions = [re.fullmatch(r".*:: (3\.\d+)", one) for one in PYPROJECT["project"]["classifiers"]]
    assert jobs["tests"]["strategy"]["matrix"]["python"] == [one.group(1) for one in versions if one]
    assert jobs["tests"]["steps"][-1]["run"] == "pip install uv && uv run pytest"


def test_ci_runs_the_test_command_of_the_readme() -> None:
    commands = re.findall(r"^pip install uv && .+$", read("README.md"), re.MULTILINE)
    assert commands == [
        "pip install uv && uv run python -m harness.track --estimator deepfool --estimator fmn",
        "pip install uv && uv run pytest",
    ]
    assert commands[1] in read(".ci/run").splitlines()
