"""The commands and snippets of the documentation: every command parses, every snippet of Python runs."""

import argparse
import csv
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness.config.options import ConfigError
from harness.config.run_config import from_namespace
from tests.test_imports import ROOMS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]*python -m [^`\n]*)`")
COMMAND = re.compile(r"python -m ((?:harness|benchmarks|tests)[.\w]*)([^`]*)")


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


def commands() -> list[tuple[str, str, list[str]]]:
    """Page, module and arguments of every command, in blocks and in lines."""
    result = []
    for page in PAGES:
        text = "\n".join(
            [*blocks(page, "bash"), *blocks(page, "sh"), *INLINE.findall(page.read_text(encoding="utf-8"))]
        )
        for line in text.replace("\\\n", " ").splitlines():
            if match := COMMAND.search(line.partition("  #")[0]):
                arguments = shlex.split(match[2].partition(" &&")[0])
                if "--help" not in arguments:
                    result.append((page.name, match[1], arguments))
    return result


class Parsed(Exception):
    """The arguments were accepted."""


@pytest.mark.parametrize(("page", "module", "arguments"), commands(), ids=lambda value: str(value)[:60])
def test_every_command_parses(page: str, module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    main = importlib.import_module(module if hasattr(importlib.import_module(module), "main") else f"{module}.__main__")
    real = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, *given: Any, **named: Any) -> argparse.Namespace:
        namespace = real(self, *given, **named)
        if module == "harness.track" and not namespace.list_estimators:
            from_namespace(namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    with pytest.raises(Parsed):
        main.main(arguments)


def test_a_command_with_a_wrong_option_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, ConfigError)):
        test_every_command_parses("x", "harness.track", ["--epoch", "3"], monkeypatch)
    with pytest.raises(ConfigError):
        test_every_command_parses("x", "harness.track", ["--model", "vgg"], monkeypatch)


def test_the_documentation_contains_commands() -> None:
    assert len(commands()) >= 15
    assert {module for _, module, _ in commands()} >= {"harness.track", "harness.report", "harness.compare"}


def test_the_tests_named_in_faults_exist() -> None:
    with (ROOT / "docs" / "survival" / "faults.csv").open(encoding="utf-8", newline="") as lines:
        faults = list(csv.DictReader(lines))
    assert len(faults) == 163
    for name in {name for fault in faults for name in fault["test"].split()}:
        file, _, function = name.partition("::")
        assert f"def {function}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), name


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("harness.figures.save", lambda *_: [])  # static figures take most of the time
    names: dict[str, Any] = {}
    for text in blocks(ROOT / "docs" / "tutorial.md", "python"):
        exec(compile(text, "docs/tutorial.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "cascade" in printed
    assert (tmp_path / "runs" / "mine" / "summary.csv").exists()
    assert list((tmp_path / "runs" / "certified" / "bounds").glob("epoch-000/crown.linf.parquet"))
    from harness.report.__main__ import main

    assert main(["runs/mine"]) == 0
    assert "<html" in (tmp_path / "runs" / "mine" / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_example_of_workers_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {
        "__name__": "__main__",
        "images": torch.rand(3, 1, 4, 4),
        "labels": torch.tensor([0, 1, 2]),
        "model": nn.Sequential(nn.Flatten(), nn.Linear(16, 3)),
    }
    (text,) = blocks(ROOT / "docs" / "scaling.md", "python")
    exec(compile(text, "docs/scaling.md", "exec"), names)
    assert list((tmp_path / "runs" / "mine" / "margins" / "epoch-000").glob("cascade.*.parquet"))


@pytest.mark.parametrize(("page", "snippets"), [("README.md", 2), ("docs/brackets.md", 1), ("docs/estimators.md", 1)])
def test_the_snippets_of_a_page_run(page: str, snippets: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    images, labels = torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 2])
    names: dict[str, Any] = {
        **{
            "images": images,
            "labels": labels,
            "x": images,
            "y": labels,
            "xt": images[:2],
            "yt": labels[:2],
            "training": images,
        },
        **{"model": nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), "Path": Path},
    }
    texts = blocks(ROOT / page, "python")
    assert len(texts) == snippets
    for text in texts:
        exec(compile(text.replace("range(41)", "range(2)"), page, "exec"), names)


def test_every_snippet_of_python_is_run_by_a_test() -> None:
    # adding.md by tests/test_adding.py; own-model.md needs Lightning, and tests/test_callbacks.py uses it
    run = {"README.md", "tutorial.md", "adding.md", "scaling.md", "brackets.md", "estimators.md", "own-model.md"}
    assert {page.name for page in PAGES if blocks(page, "python")} <= run


# documented names that are not at the package's root under their own name, and why
ELSEWHERE = {
    "attacks.measure.measure": "attacks.measure is the module; the function is harness.measure",
    "harness.callbacks.lightning.MarginCallback": "one name for two libraries, each of which is an extra",
    "harness.callbacks.transformers.MarginCallback": "one name for two libraries, each of which is an extra",
    "harness.callbacks.transformers.Logits": "needs an extra",
}
IMPORTED = re.compile(r"^ *from ((?:attacks|harness)[\w.]*) import ([\w, ]+)", re.MULTILINE)


def documented() -> list[str]:
    """Names with a place in the reference, and names that code blocks import.

    Blocks of docs/adding.md are files of the packages, which import from each other.
    """
    found = [
        name
        for page in PAGES[1:] + sorted((ROOT / "docs" / "api").glob("*.md"))
        for name in re.findall(r"^::: ([\w.]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    for page in PAGES:
        for block in blocks(page, "python") if page.name != "adding.md" else []:
            found += [
                f"{module}.{name.strip()}" for module, names in IMPORTED.findall(block) for name in names.split(",")
            ]
    return sorted(set(found))


@pytest.mark.parametrize("path", documented())
def test_documented_names_are_at_the_root_of_their_package(path: str) -> None:
    module, _, name = path.rpartition(".")
    root = importlib.import_module(path.partition(".")[0])
    if path in ELSEWHERE:
        assert name not in root._HOME
        return
    assert name in root.__all__
    assert getattr(root, name) is getattr(importlib.import_module(module), name)


def test_there_are_documented_names_and_no_needless_exceptions() -> None:
    assert len(documented()) > 40
    assert set(ELSEWHERE) <= set(documented())
    assert importlib.import_module("harness").measure is importlib.import_module("attacks.measure").measure


@pytest.mark.parametrize("package", ["attacks", "harness"])
def test_lazy_names_are_listed_once_and_load(package: str) -> None:
    root = importlib.import_module(package)
    assert sorted(root.__all__) == sorted(root._HOME)
    assert all(getattr(root, name) is not None for name in root.__all__)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'gone'"):
        root.gone  # noqa: B018


def test_the_map_names_every_room_and_the_tests_of_its_laws() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    named = set(re.findall(r"`([\w./]+?)/?`", text))
    for package, rooms in ROOMS.items():
        assert set(rooms) - named == set(), package
    tests = {name for name in named if name.startswith("test_")}
    assert len(tests) > 10
    assert all((ROOT / "tests" / f"{name}.py").exists() for name in tests)
    folders = {path.name for path in (ROOT / "benchmarks").iterdir() if (path / "__init__.py").exists()}
    assert {"compare", "speed", "figure1", "reproduce"} <= folders & named
