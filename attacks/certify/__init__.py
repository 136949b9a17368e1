"""Margins of small ReLU networks from below: sound bounds and, where a search ends, exact values."""
