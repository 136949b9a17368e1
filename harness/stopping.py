"""How processes are ended: SIGTERM, which schedulers send before they kill, as Ctrl-C; children with their parent."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

CHILD = "MARGIN_HARNESS_CHILD"  # environment variable of a process whose standard input ends with its parent


@contextlib.contextmanager
def terminated_is_interrupted() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt; elsewhere than in the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def interrupts_ignored() -> Iterator[None]:
    """Let a process that is started ignore Ctrl-C from its first moment: it leaves that to its parent."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def end_when(parent_ended: Callable[[], object]) -> None:
    """End this process, whatever it does, when a call returns that waits for the end of a pipe of its parent's.

    A parent that is killed says nothing, but its end of a pipe is closed.
    """
    threading.Thread(target=lambda: (parent_ended(), os._exit(1)), daemon=True).start()


def child_environment() -> dict[str, str]:
    """The environment of a command that ends with this process, which must hold a pipe to its standard input."""
    return {**os.environ, CHILD: "1"}


def end_with_parent() -> None:
    """Where this process was started with `child_environment`, end it with its parent."""
    if os.environ.pop(CHILD, None):
        end_when(lambda: os.read(0, 1))
