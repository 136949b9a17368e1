"""The tutorial followed to the letter, on the clock: ``python -m benchmarks.newcomer --out docs/newcomer/newcomer``.

In a fresh clone of this checkout with a virtual environment of its own: commands are typed as they stand, and the
Python goes into ``mine.py``, which is started where the page goes on to a command.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness.command import run_command
from harness.config.options import OneLineParser
from harness.store import environment, now
from harness.store.files import write_text

BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FIRST_FIGURE = "runs/first/figures/margins.png"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 1 where a step fails or the figure is not there."""
    parser = OneLineParser(prog="python -m benchmarks.newcomer", description=__doc__)
    parser.add_argument("--out", type=Path, metavar="STEM", help="also write STEM.json and the table as STEM.md")
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="newcomer-") as folder:
        place = Path(folder) / "margin-harness"
        subprocess.run(["git", "clone", "--quiet", str(Path.cwd()), str(place)], check=True)
        venv.create(Path(folder) / "own", with_pip=True)
        steps = list(_followed(place, Path(folder) / "own" / "bin"))
        whole = (place / FIRST_FIGURE).exists() and all(step["code"] == 0 for step in steps)
    lines = ["| typed | seconds |", "|---|---:|", *(f"| `{step['typed']}` | {step['seconds']:.0f} |" for step in steps)]
    lines.append(f"| all of it | {sum(float(step['seconds']) for step in steps):.0f} |")
    print("\n".join(lines))
    if given.out:
        facts = {"created": now(), "steps": steps, "first figure": whole, **environment(1)}
        write_text(given.out.with_suffix(".json"), json.dumps(facts, indent=2) + "\n")
        write_text(given.out.with_suffix(".md"), "\n".join(lines) + "\n")
    return 0 if whole else 1


def _followed(place: Path, programs: Path) -> Iterator[dict[str, str | float]]:
    """Each step with its exit code and seconds."""
    variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    variables["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"
    written, started = "", ""
    for language, text in BLOCK.findall((place / "docs" / "tutorial.md").read_text(encoding="utf-8")):
        if language == "python":
            written += text
            continue
        commands = text.strip().splitlines()
        if written != started:
            (place / "mine.py").write_text(written, encoding="utf-8")
            commands, started = ["uv run python mine.py", *commands], written
        for typed in commands:
            began = time.perf_counter()
            done = subprocess.run(typed, shell=True, cwd=place, env=variables, capture_output=True, text=True)
            if done.returncode:
                print(done.stderr[-500:], file=sys.stderr)
            yield {"typed": typed, "code": done.returncode, "seconds": time.perf_counter() - began}


if __name__ == "__main__":
    sys.exit(run_command(main))
