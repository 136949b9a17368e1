"""Speed side by side with the libraries, margins compared first: ``python -m benchmarks.speed``."""
