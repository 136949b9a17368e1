"""Margins over training: the tracker, a run that trains, and a finished run measured again."""
