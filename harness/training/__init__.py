"""The training loop and the training objectives."""
