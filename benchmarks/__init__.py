"""Commands that measure the estimators; each prints a table and writes JSON with machine and versions."""
