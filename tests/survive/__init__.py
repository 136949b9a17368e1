"""Runs that are killed or damaged, resumed, and compared with undisturbed ones: ``python -m tests.survive``."""
