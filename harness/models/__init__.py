"""Classifiers: built here, taken from libraries, or with the weights of an existing checkpoint."""
