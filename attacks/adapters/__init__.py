"""Adapters to Foolbox and torchattacks, and the ladder of radii for fixed-radius attacks."""
