"""Classifiers: built here, from libraries, or with weights from a file."""
