"""Processes that a benchmark may lose: forked, and quiet about it."""

from __future__ import annotations

import faulthandler
import os
import warnings

import torch


def fork() -> int:
    """`os.fork`; the child has one torch thread and leaves no dump of a crash.

    Python warns of forking where there are threads, whose locks the child may wait for in vain: whoever calls this has
    a limit of time on its children.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        faulthandler.disable()
        torch.set_num_threads(1)
    return child
