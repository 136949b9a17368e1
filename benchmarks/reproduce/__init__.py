"""The paper's experiments from one file: run them, store their summaries, and generate the page."""
