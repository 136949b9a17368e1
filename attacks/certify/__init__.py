"""Certifiers: sound lower bounds of margins and, for small ReLU networks, exact margins."""
