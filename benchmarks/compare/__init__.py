"""Compare estimators with exact margins and with each other: `python -m benchmarks.compare`."""
