"""Whether a tracked run survives what happens to runs: ``python -m benchmarks.survive``."""
