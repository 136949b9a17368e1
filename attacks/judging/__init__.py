"""The judge: verify an estimator's points, retry with noise, refine, and compute distances."""
