"""List known advisories of the pinned versions; says so and fails where there is no network to ask."""

import subprocess
import sys

# the default service answers "not found", and nothing else, for whatever a mirror does not describe
COMMAND = ("-m", "pip_audit", "--vulnerability-service", "osv", "--disable-pip", "--no-deps", "-r", "constraints.txt")

done = subprocess.run([sys.executable, *COMMAND], capture_output=True, text=True)
print(done.stdout, end="")
if "ConnectionError" in done.stderr or "NameResolutionError" in done.stderr:
    sys.exit("audit: error: expected a network to ask for advisories, got none; run it where there is one")
print(done.stderr, end="", file=sys.stderr)
sys.exit(done.returncode)
