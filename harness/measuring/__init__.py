"""Margins and bounds of one epoch: which units, their tasks, rows and witnesses."""
