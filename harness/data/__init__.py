"""Data sets, the user's own data and the probe images."""
