"""Output of a run: complete numbers at every width, unchanged names, progress bars only on a terminal."""

import errno
import io
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from harness.statistics import SUMMARY_COLUMNS
from harness.store import RunFolder, Unit
from harness.tracking.terminal import Terminal, open_console, print_summary

ESTIMATORS = ("deepfool", "foolbox:LinfBasicIterativeAttack:abs_stepsize=[bold]0.01,steps=20")


def summary(epochs: tuple[int, ...] = (0, 1, 2, 20), images: int = 1000) -> pd.DataFrame:
    rows = [
        {
            **dict.fromkeys(SUMMARY_COLUMNS, 0),
            **{"epoch": epoch, "split": split, "subset": subset, "estimator": estimator, "norm": norm},
            **{"count": images, "found": images - 2, "avg": 1 + place / 1000, "se": 0.0123, "tied": 1, "not_found": 1},
            **{"after_noise": 3, "forwards": 30.4, "backwards": 10.2},
        }
        for place, (epoch, estimator, norm, split, subset) in enumerate(
            itertools.product(epochs, ESTIMATORS, ("l2", "linf"), ("train", "test"), ("all", "correct"))
        )
    ]
    return pd.DataFrame(rows)


def errors() -> pd.DataFrame:
    return pd.DataFrame({"epoch": [0, 0, 20, 20], "split": ["train", "test"] * 2, "error": [0.9, 0.9, 0.01, 0.025]})


def printed(width: int, table: pd.DataFrame, epochs: pd.DataFrame) -> str:
    out = io.StringIO()
    folder = RunFolder(Path("runs") / ("a-long-name-" * 12 + "[red]"))
    print_summary(Console(file=out, width=width), table, folder, epochs)
    return out.getvalue()


@pytest.mark.parametrize(("width", "shown"), [(120, (0, 1, 20)), (100, (0, 1, 20)), (80, (0, 20))])
def test_numbers_are_never_truncated(width: int, shown: tuple[int, ...]) -> None:
    table = summary()
    text = printed(width, table, errors())
    assert "…" not in text
    whole = table[table["subset"] == "all"]
    for _, row in whole.iterrows():
        assert (f"{row['avg']:.4f} ± 0.0123" in text) == (row["epoch"] in shown)
    for word in ("linf", "1000 train", "1000 test", "3992/4000", "41", *(f"epoch {epoch}" for epoch in shown)):
        assert word in text, word
    assert not any(f"{row['avg']:.4f}" in text for _, row in table[table["subset"] == "correct"].iterrows())


def test_names_are_printed_as_they_are_and_paths_in_one_line() -> None:
    lines = printed(80, summary(), errors()).splitlines()
    assert "run folder: runs/" + "a-long-name-" * 12 + "[red]" in lines
    assert f"{ESTIMATORS[1]} l2: 8000 images (24 after noise, 8 not found, 8 tied)" in lines
    assert "error at epoch 20: train 1.00%, test 2.50%" in lines
    # names are wrapped, not truncated
    wide = printed(300, summary(), errors())
    assert any(line.strip().startswith(f"{ESTIMATORS[1]}  linf") for line in wide.splitlines())


def test_runs_without_margins_one_image_or_rows_are_reported() -> None:
    table = summary(epochs=(0,), images=3)
    table.loc[0, ["found", "avg", "se"]] = [0, math.nan, math.nan]
    table.loc[2, "se"] = math.nan
    text = printed(120, table, errors().iloc[:0])
    assert "none found" in text
    assert f"{table.loc[2, 'avg']:.4f}  " in text
    assert "nan" not in text
    assert "error at epoch" not in text
    assert "run folder: " in printed(80, table.iloc[:0], errors().iloc[:0])


def play(terminal: Terminal) -> None:
    """A run of two epochs, the second of which is not measured."""
    with terminal:
        for epoch in (0, 1):
            terminal.training_started(epoch)
            terminal.batch_done(1, 2)
            if epoch == 0:
                terminal.units_started(epoch, [Unit("fmn", "l2")], 20)
                terminal.images_done(12)
                terminal.images_done(8)
                terminal.unit_ended(epoch, Unit("fmn", "l2"), pd.DataFrame())
            rows = summary(epochs=(0,)) if epoch == 0 else pd.DataFrame(columns=list(SUMMARY_COLUMNS))
            terminal.epoch_ended(epoch, {"train": 0.5, "test": 0.25}, rows)


def test_one_plain_line_per_epoch_without_a_terminal() -> None:
    out = io.StringIO()
    play(Terminal(Console(file=out, width=40), epochs=1))
    first, second = out.getvalue().splitlines()
    assert first.startswith(
        "epoch   0/1 | error train 50.00% test 25.00% | deepfool l2 train 1.0000 test 1.0020 (6 after"
    )
    assert f" | {ESTIMATORS[1]} linf train 1.0120 test 1.0140 (6 after noise, 2 not found, 2 tied) | " in first
    assert second.startswith("epoch   1/1 | error train 50.00% test 25.00% | ")
    assert second.endswith(" images/s, 0:00:00 left")
    assert second.count("|") == 2


def test_a_terminal_shows_progress_bars() -> None:
    out = io.StringIO()
    play(Terminal(Console(file=out, width=100, force_terminal=True), epochs=1))
    text = out.getvalue()
    for words in ("\x1b[", "measuring fmn l2", "0/20 images", "2/2 epochs", "epoch   1/1"):
        assert words in text, words


@pytest.mark.parametrize("width", [0, 1, 20, 40])
def test_a_narrow_terminal_truncates_no_number(width: int) -> None:
    text = printed(max(width, 1), summary(), errors())
    assert "…" not in text
    whole = summary()
    for _, row in whole[(whole["subset"] == "all") & whole["epoch"].isin((0, 20))].iterrows():
        assert f"{row['avg']:.4f} ± 0.0123" in text


def test_a_terminal_of_zero_width_shows_the_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("harness.tracking.terminal.Console", lambda width: Console(width=0))
    console = open_console()
    Terminal(console, 1).say("one line")
    assert (console.width, capsys.readouterr().out) == (1, "one line\n")


def test_an_ascii_terminal_gets_ascii() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    print_summary(Console(file=out, width=120), summary(), RunFolder(Path("run")), errors())
    out.flush()
    assert b"1.0000 +/- 0.0123" in raw.getvalue()


# output that cannot be written

COMMAND = """
import sys
from harness.command import run_command
def main():
    for number in range({lines}):
        print(number, "\\xb1 \\udcff")
    print("said", file=sys.stderr)
    open({done!r}, "w").close()
    return 0
sys.exit(run_command(main))
"""


def commanded(folder: Path, stdout: int | None, lines: int = 20_000, **more: str) -> tuple[int, str]:
    """The exit code and standard error of a command that prints and must run to its end."""
    code = COMMAND.format(lines=lines, done=str(folder / "done"))
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**os.environ, **more},
        # a closed output, as by `>&-`
        preexec_fn=None if stdout is not None else lambda: os.close(1),
    )
    _, stderr = process.communicate(timeout=60)
    assert (folder / "done").exists()
    return process.returncode, stderr.decode()


def test_a_closed_pipe_does_not_end_a_command(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        assert commanded(tmp_path, writing) == (0, "said\n")
    finally:
        os.close(writing)


def test_a_closed_stdout_does_not_end_a_command(tmp_path: Path) -> None:
    assert commanded(tmp_path, None) == (0, "said\n")


def test_an_ascii_stdout_does_not_end_a_command_and_loses_no_output(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with path.open("wb") as out:
        assert commanded(tmp_path, out.fileno(), 2, PYTHONIOENCODING="ascii") == (0, "said\n")
    assert path.read_bytes() == b"0 \\xb1 \\udcff\n1 \\xb1 \\udcff\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_reported_at_the_end(tmp_path: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        code, stderr = commanded(tmp_path, full.fileno())
    lost = f"[Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}"
    assert (code, stderr) == (1, f"said\nerror: output was lost: {lost}; make room, or send it elsewhere\n")


def test_every_module_with_a_command_calls_run_command() -> None:
    root = Path(__file__).parents[1]
    mains = [
        path
        for folder in ("harness", "benchmarks")
        for path in (root / folder).rglob("*.py")
        if "\n    sys.exit(" in path.read_text(encoding="utf-8")
    ]
    assert len(mains) >= 12
    for path in mains:
        assert path.read_text(encoding="utf-8").endswith("    sys.exit(run_command(main))\n"), path
