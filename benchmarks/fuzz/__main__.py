"""The command: so many damaged files a reader; what is neither read nor refused in one line is kept as a test."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.fuzz.readers import READERS
from benchmarks.fuzz.trying import Tally, fuzz
from harness.command import run_command
from harness.config.options import OneLineParser
from harness.store import environment, now
from harness.store.files import write_atomically

CORPUS = Path("tests/corpus")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 1 where there is a finding."""
    parser = OneLineParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="a reader (default: 1000)")
    parser.add_argument(
        "--reader", action="append", choices=[r.name for r in READERS], help="repeatable (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default: 0)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write JSON, and the table as FILE.md")
    given = parser.parse_args(argv)
    if given.cases < 1:
        parser.error(f"expected --cases of at least 1, got {given.cases}; give a larger number")
    tallies = []
    for reader in READERS:
        if given.reader and reader.name not in given.reader:
            continue
        tallies.append(tally := fuzz(reader, given.cases, given.seed))
        print(f"fuzz: {tally.name}: {tally.cases} cases, {len(tally.findings)} findings", file=sys.stderr, flush=True)
        _keep(tally)
    print(table(tallies))
    if given.out:
        counts = [vars(tally) | {"findings": [verdict for verdict, _ in tally.findings]} for tally in tallies]
        text = json.dumps({"created": now(), "seed": given.seed, "readers": counts, **environment()}, indent=2) + "\n"
        write_atomically(given.out, lambda path: path.write_text(text, encoding="utf-8"))
        write_atomically(
            given.out.with_suffix(".md"), lambda path: path.write_text(table(tallies) + "\n", encoding="utf-8")
        )
    return 1 if any(tally.findings for tally in tallies) else 0


def _keep(tally: Tally) -> None:
    """A finding of each verdict becomes a file of the corpus, which tests/test_fuzz.py reads."""
    seen = set()
    for verdict, content in tally.findings:
        kind = verdict.partition(":")[0]
        print(f"fuzz: {tally.name}: {verdict}", file=sys.stderr, flush=True)
        if kind in seen or len(content) > 100_000:
            continue
        seen.add(kind)
        folder = CORPUS / tally.name.replace(" ", "-").replace("'", "").replace(",", "")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / hashlib.sha256(content).hexdigest()[:16]).write_bytes(content)


def table(tallies: Sequence[Tally]) -> str:
    """Cases and findings of each reader in Markdown."""
    lines = ["| reader | cases | refused in one line | read | findings | seconds |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {t.name} | {t.cases:,} | {t.refused:,} | {t.read:,} | {len(t.findings)} | {t.seconds:.0f} |"
        for t in tallies
    ]
    total = [sum(getattr(t, name) for t in tallies) for name in ("cases", "refused", "read")]
    findings = sum(len(t.findings) for t in tallies)
    return "\n".join([*lines, f"| all | {total[0]:,} | {total[1]:,} | {total[2]:,} | {findings} | |"])


if __name__ == "__main__":
    sys.exit(run_command(main))
