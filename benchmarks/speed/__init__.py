"""Compare speed with the libraries, after comparing margins: ``python -m benchmarks.speed``."""
