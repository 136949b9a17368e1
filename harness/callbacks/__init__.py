"""Callbacks that measure margins in Lightning and in Hugging Face's Trainer; each is an optional extra."""
