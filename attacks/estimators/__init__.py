"""Estimators, one module each, named as the user types it. No estimator imports another."""
