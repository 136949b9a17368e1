"""List known advisories of the pinned versions; says so and fails where there is no network to ask."""

import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"

pins = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["tool"]["uv"]["constraint-dependencies"]
with tempfile.TemporaryDirectory() as folder:
    listed = Path(folder) / "pins.txt"
    listed.write_text("\n".join(pins) + "\n", encoding="utf-8")
    # the default service answers "not found", and nothing else, for whatever a mirror does not describe
    command = ("-m", "pip_audit", "--vulnerability-service", "osv", "--disable-pip", "--no-deps", "-r", str(listed))
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
print(done.stdout, end="")
if "ConnectionError" in done.stderr or "NameResolutionError" in done.stderr:
    sys.exit("audit: error: expected a network to ask for advisories, got none; run it where there is one")
print(done.stderr, end="", file=sys.stderr)
sys.exit(done.returncode)
