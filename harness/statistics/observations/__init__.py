"""The three observations of the paper: evidence, verdicts and the pairing of runs."""
