"""Figure 1 of the paper, compared with a plain script: ``python -m benchmarks.figure1``."""
