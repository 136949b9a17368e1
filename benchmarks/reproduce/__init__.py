"""The paper's experiments from one file: run them, keep their summaries, and make the page of them."""
