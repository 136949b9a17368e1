"""Margins in training loops of others: Lightning and Hugging Face's Trainer. Each is an extra."""
