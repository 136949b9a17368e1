"""The command: N damaged files per reader; files neither read nor refused in one line become tests."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.command import run_command
from harness.config.options import OneLineParser
from tests.fuzz.readers import READERS
from tests.fuzz.reading import corpus_name
from tests.fuzz.trying import Tally, fuzz

CORPUS = Path(__file__).parents[1] / "corpus"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code, which is 1 if there are findings."""
    parser = OneLineParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="damaged files per reader (default: 1000)")
    parser.add_argument(
        "--reader", action="append", choices=[r.name for r in READERS], help="repeatable (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default: 0)")
    options = parser.parse_args(argv)
    if options.cases < 1:
        parser.error(f"expected --cases of at least 1, got {options.cases}; give a larger number")
    tallies = []
    for reader in READERS:
        if options.reader and reader.name not in options.reader:
            continue
        tallies.append(tally := fuzz(reader, options.cases, options.seed))
        print(f"fuzz: {tally.name}: {tally.cases} cases, {len(tally.findings)} findings", file=sys.stderr, flush=True)
        _keep(tally)
    print(table(tallies))
    return 1 if any(tally.findings for tally in tallies) else 0


def _keep(tally: Tally) -> None:
    """Write one file per kind of finding to the corpus, which tests/test_fuzz.py reads."""
    kinds = set()
    for verdict, content in tally.findings:
        kind = verdict.partition(":")[0]
        print(f"fuzz: {tally.name}: {verdict}", file=sys.stderr, flush=True)
        if kind in kinds or len(content) > 100_000:
            continue
        kinds.add(kind)
        folder = CORPUS / corpus_name(tally.name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / hashlib.sha256(content).hexdigest()[:16]).write_bytes(content)


def table(tallies: Sequence[Tally]) -> str:
    """Format cases and findings per reader as a Markdown table."""
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
