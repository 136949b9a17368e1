"""What the documentation tells people to type: every snippet runs, every command has options that there are."""

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

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]*python -m [^`\n]*)`")
COMMAND = re.compile(r"python -m ((?:harness|benchmarks|tests)[.\w]*)([^`]*)")


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language]


def commands() -> list[tuple[str, str, list[str]]]:
    """Page, module and arguments of every command, in blocks and in lines."""
    found = []
    for page in PAGES:
        text = "\n".join(
            [*blocks(page, "bash"), *blocks(page, "sh"), *INLINE.findall(page.read_text(encoding="utf-8"))]
        )
        for line in text.replace("\\\n", " ").splitlines():
            if match := COMMAND.search(line.partition("  #")[0]):
                arguments = shlex.split(match[2].partition(" &&")[0])
                if "--help" not in arguments:
                    found.append((page.name, match[1], arguments))
    return found


class Parsed(Exception):
    """The parser was content."""


@pytest.mark.parametrize(("page", "module", "arguments"), commands(), ids=lambda value: str(value)[:60])
def test_every_command_has_options_that_there_are(
    page: str, module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
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
        test_every_command_has_options_that_there_are("x", "harness.track", ["--epoch", "3"], monkeypatch)
    with pytest.raises(ConfigError):
        test_every_command_has_options_that_there_are("x", "harness.track", ["--model", "vgg"], monkeypatch)


def test_commands_were_found() -> None:
    assert len(commands()) >= 15
    assert {module for _, module, _ in commands()} >= {"harness.track", "harness.report", "harness.compare"}


def test_the_tests_of_faults_are_there() -> None:
    with (ROOT / "docs" / "survival" / "faults.csv").open(encoding="utf-8", newline="") as lines:
        faults = list(csv.DictReader(lines))
    assert len(faults) == 163
    for name in {name for fault in faults for name in fault["test"].split()}:
        file, _, function = name.partition("::")
        assert f"def {function}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), name


def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
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


def test_the_example_of_an_estimator_runs_and_its_claim_holds() -> None:
    names: dict[str, Any] = {"__name__": "adding"}
    torch.manual_seed(0)
    for text in blocks(ROOT / "docs" / "adding.md", "python"):
        exec(compile(text, "docs/adding.md", "exec"), names)
    ratio = names["found"].distance / names["affine_margins"](
        names["layer"].weight, names["layer"].bias, names["images"], "l2", domain="box"
    )
    assert (ratio >= 1 - 1e-5).all()
    assert ratio[ratio.isfinite()].median() < names["Straight"].tightness["l2"]


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


def test_the_snippets_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {
        "x": torch.rand(3, 1, 4, 4),
        "y": torch.tensor([0, 1, 2]),
        "xt": torch.rand(2, 1, 4, 4),
        "yt": torch.tensor([0, 1]),
        "model": nn.Sequential(nn.Flatten(), nn.Linear(16, 3)),
        "images": torch.rand(2, 1, 4, 4),
        "Path": Path,
    }
    run = 0
    for text in blocks(ROOT / "README.md", "python"):
        if "harness.callbacks" in text or "class " in text:  # with their libraries, and in tests of their own
            continue
        exec(compile(text.replace("range(41)", "range(2)"), "README.md", "exec"), names)
        run += 1
    assert run >= 2
