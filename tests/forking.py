"""Forked processes that may be killed or crash."""

from __future__ import annotations

import faulthandler
import os
import warnings

import torch


def fork() -> int:
    """Call `os.fork`; the child has one torch thread and prints no traceback of a crash.

    Python warns of forking a process with threads, because the child may wait forever for a lock that a thread holds.
    The warning is hidden here, so callers must set a time limit for their children.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        faulthandler.disable()
        torch.set_num_threads(1)
    return child
