"""Figure 1 of the paper, whole, against a plain script: ``python -m benchmarks.figure1``."""
