"""Every reader refuses damaged files in one line or gives unchanged values: past findings and new damage."""

from pathlib import Path

import pytest

from harness.store.identity import StoreError
from tests.fuzz.__main__ import CORPUS, main, table
from tests.fuzz.readers import READERS
from tests.fuzz.reading import Reader, corpus_name, fingerprint
from tests.fuzz.trying import Tally, fuzz, judge

BY_FOLDER = {corpus_name(reader.name): reader for reader in READERS}
FOUND = sorted(path for path in CORPUS.rglob("*") if path.is_file())


@pytest.mark.parametrize("case", FOUND, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_past_findings_are_refused(tmp_path: Path, case: Path) -> None:
    reader = BY_FOLDER[case.parent.name]
    path = reader.make(tmp_path)
    whole = fingerprint(reader.read(path))
    path.write_bytes(case.read_bytes())
    assert judge(reader, path, whole) == "refused"


# seconds each: the other readers are slow
ORDINARY = ("manifest", "margin part", "checkpoint", "witnesses and probes")


@pytest.mark.parametrize(
    "reader",
    [
        pytest.param(reader, id=reader.name, marks=() if reader.name in ORDINARY else pytest.mark.slow)
        for reader in READERS
    ],
)
def test_damaged_and_hostile_files_are_refused_or_read_unchanged(reader: Reader) -> None:
    tally = fuzz(reader, cases=8, seed=7)
    assert tally.findings == []
    assert tally.cases >= 13
    assert tally.read + tally.refused == tally.cases
    assert tally.refused > tally.cases // 4


@pytest.mark.slow
def test_many_damaged_files_are_refused_or_read_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tests.fuzz.__main__.CORPUS", tmp_path)
    assert main(["--cases", "150", "--seed", "1"]) == 0
    total = capsys.readouterr().out.splitlines()[-1]
    assert total.startswith("| all | 3,105 |")
    assert total.endswith("| 0 | |")


# controls: defects of a reader must be detected


def _text(folder: Path) -> Path:
    (folder / "text").write_text("12345678")
    return folder / "text"


def _unpickle(path: Path) -> object:
    import pickle

    return pickle.loads(path.read_bytes())


def _crash(path: Path) -> object:
    if path.read_text(errors="replace") != "12345678":
        import os

        os.abort()
    return 0


def _sloppy(path: Path) -> object:
    content = path.read_text(errors="replace")
    if len(content) < 4:
        raise StoreError(f"no\nno {content}")
    return content[:7]


@pytest.mark.parametrize(
    ("read", "verdict"),
    [
        (_unpickle, "code was run"),
        pytest.param(_crash, "the process ended with -6", marks=pytest.mark.slow),
        (_sloppy, "gave other values"),
        pytest.param(_sloppy, "said ", marks=pytest.mark.slow),
        (lambda path: path.read_bytes().decode("ascii"), "UnicodeDecodeError"),
    ],
    ids=["code", "crash", "other values", "two lines", "traceback"],
)
def test_a_planted_fault_is_found(read: object, verdict: str) -> None:
    reader = Reader("planted", _text, read, (StoreError,), checked=True)  # type: ignore[arg-type]
    if verdict == "code was run":
        # it must be able to read its undamaged file
        reader = Reader("planted", _pickled, read, (Exception,), checked=True)  # type: ignore[arg-type]
    tally = fuzz(reader, cases=60, seed=0)
    assert any(found.startswith(verdict) for found, _ in tally.findings), tally.findings


def _pickled(folder: Path) -> Path:
    import pickle

    (folder / "pickle").write_bytes(pickle.dumps([1, 2]))
    return folder / "pickle"


def test_the_table_counts_everything() -> None:
    tallies = [Tally("a", 10, 3, 6, 1.0, [("oh", b"")]), Tally("b", 5, 0, 5, 2.0)]
    assert table(tallies).splitlines()[-1] == "| all | 15 | 11 | 3 | 1 | |"
