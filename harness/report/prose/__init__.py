"""Sentences and text sections of the page."""
