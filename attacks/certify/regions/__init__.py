"""Activation regions of ReLU networks: the nearest boundary point of each, and the walk between neighbours."""
