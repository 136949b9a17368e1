"""Activation regions of ReLU networks: nearest points of their faces, and the walk along them."""
