"""The interactive figures of the page, one module per subject as in `harness.figures`."""
