"""The benchmark of input gradients: all its ways end at one gradient, and one that does not is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from benchmarks.gradients import _phases, check, convolution_ways, main, network_ways


def test_ways_agree_and_one_that_does_not_is_refused() -> None:
    for ways in (network_ways(3), convolution_ways(3)):
        gradients = {name: way() for name, way in ways.items() if "forward" not in name}
        assert len(gradients) >= 3
        first = next(iter(gradients.values()))
        assert first.std() > 0
        wrong = {"first": lambda first=first: first, "other": lambda first=first: 1.01 * first}
        with pytest.raises(AssertionError):
            check(wrong)


def test_four_phases_are_the_transposed_convolution() -> None:
    weight, gradient = torch.rand(32, 16, 4, 4), torch.rand(2, 32, 5, 6)
    expected = functional.conv_transpose2d(gradient, weight, stride=2, padding=1)
    got = functional.pixel_shuffle(functional.conv2d(gradient, _phases(weight), padding=1), 2)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--batch", "2", "--repeats", "1", "--out", str(tmp_path / "gradients.json")]) == 0
    rows = json.loads((tmp_path / "gradients.json").read_text())["rows"]
    assert len(rows) == 9
    assert all(row["seconds"] > 0 and row["images"] == 2 for row in rows)
    assert capsys.readouterr().out.count("second convolution") == 5
    with pytest.raises(SystemExit):
        main(["--repeats", "0"])
