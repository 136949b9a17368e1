"""One module per estimator, under the name that a user types. None imports another."""
