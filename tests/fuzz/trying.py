"""Gives a reader damaged files, each of which it must read with unchanged values or refuse in one line."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.forking import fork
from tests.fuzz.mutations import hostile, in_torch_file, mutate
from tests.fuzz.readers import READERS
from tests.fuzz.reading import Reader, fingerprint

# seconds after which a reader counts as hung
PATIENCE = 20
CASES_PER_CHILD = 200


@dataclass
class Tally:
    """The outcomes of a reader's cases.

    Attributes:
        read: files read with the undamaged values, or with any values if the reader has no checksums.
        findings: verdict and content of each file that was neither read nor refused in one line.
    """

    name: str
    cases: int = 0
    read: int = 0
    refused: int = 0
    seconds: float = 0.0
    findings: list[tuple[str, bytes]] = field(default_factory=list)


def judge(reader: Reader, path: Path, whole: str) -> str:
    """Return ``read``, ``refused`` or a description of what the reader did wrong.

    Args:
        whole: `fingerprint` of the undamaged file's values.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = reader.read(path)
    except reader.refuses as error:
        text = " ".join(str(error).split("\n"))
        lines = str(error).count("\n")
        event = "checksum mismatch in " in text or " is damaged: " in text
        one_line = event or ("expected " in text and ", got " in text)
        return "refused" if one_line and not lines else f"said {text[:200]!r}"
    except SystemExit as error:  # an argument parser has printed the error in one line
        return "refused" if error.code == 2 else f"ended with {error.code}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    if reader.checked and fingerprint(value) != whole:
        return "gave other values"
    return "read"


def fuzz(reader: Reader, cases: int, seed: int) -> Tally:
    """Try damaged files in child processes, so that a crash or a hang is a finding too."""
    tally, began = Tally(reader.name), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        work = Path(folder)
        (work / "whole").write_bytes(_made(reader, work).read_bytes())
        contents = list(_contents(reader, cases, seed, work))
        while tally.cases < len(contents):
            batch = contents[tally.cases : tally.cases + CASES_PER_CHILD]
            for verdict, content in zip(_in_child(reader, batch, work), batch, strict=False):
                tally.cases += 1
                tally.read += verdict == "read"
                tally.refused += verdict == "refused"
                if verdict not in ("read", "refused"):
                    tally.findings.append((verdict, content))
        if (work / "canary").exists():
            tally.findings.append(("code was run", b""))
    tally.seconds = time.perf_counter() - began
    return tally


def _contents(reader: Reader, cases: int, seed: int, work: Path) -> Iterator[bytes]:
    """Yield the hostile files, then the damaged ones."""
    draw = random.Random(f"{reader.name} {seed}")
    whole = (work / "whole").read_bytes()
    others = [_made(other, work).read_bytes() for other in READERS if other.name != reader.name]
    for content in hostile(work / "canary"):
        yield content
        if reader.name == "trainer's state":
            path = _made(reader, work)
            in_torch_file(path, content)
            yield path.read_bytes()
    for _ in range(cases):
        yield mutate(whole, draw, others)


def _made(reader: Reader, work: Path) -> Path:
    return reader.make(Path(tempfile.mkdtemp(dir=work)))


def _in_child(reader: Reader, batch: Sequence[bytes], work: Path) -> list[str]:
    """Return the verdicts on the batch, up to and including the first case that ends the process."""
    said = work / "verdicts"
    said.write_text("")
    child = fork()
    if child == 0:
        with contextlib.suppress(BaseException), said.open("a") as out:
            path = _made(reader, work)
            # some files name the process or time that wrote them
            path.write_bytes((work / "whole").read_bytes())
            whole = fingerprint(reader.read(path))
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 2)
            for content in batch:
                path.write_bytes(content)
                # the default action of the alarm ends the process
                signal.alarm(PATIENCE)
                verdict = judge(reader, path, whole)
                signal.alarm(0)
                out.write(json.dumps(verdict) + "\n")
                out.flush()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    verdicts = [str(json.loads(line)) for line in said.read_text().splitlines()]
    if len(verdicts) < len(batch):
        code = os.waitstatus_to_exitcode(status)
        verdicts.append("hung" if code == -signal.SIGALRM else f"the process ended with {code}")
    return verdicts
