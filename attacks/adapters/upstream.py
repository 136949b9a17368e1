"""Foolbox, imported with its two obstacles out of the way; import it from here only."""

from __future__ import annotations

import os
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # foolbox imports scipy.ndimage.filters
    # foolbox.zoo imports GitPython, which raises where there is no git executable
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    import foolbox
    from foolbox import attacks as library

__all__ = ["foolbox", "library"]
