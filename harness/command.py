"""The frame of every command: exit codes, output that cannot stop it, SIGTERM, children that end with their parent."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

FAILED = 1
# the reader is gone: a pipe that was closed, a terminal that hung up
GONE = (errno.EPIPE, errno.EIO)
CHILD = "MARGIN_HARNESS_CHILD"  # environment variable of a process whose standard input ends with its parent


def run_command(main: Callable[[], int | None]) -> int:
    """Run a command's ``main``, so that its output cannot stop it; returns its exit code.

    What cannot be written is dropped. A reader that is gone is no failure; output that is lost for another reason (a
    full disk) is one, which is said at the end.
    """
    end_with_parent()
    outputs = protect_output()
    try:
        code = main() or 0
    except SystemExit as ended:  # argparse's
        code = ended.code if isinstance(ended.code, int) else FAILED if ended.code else 0
    lost = [error for output in outputs if (error := output.finish()) is not None and error.errno not in GONE]
    if lost:
        sys.stderr.write(f"error: output was lost: {lost[0]}; make room, or send it elsewhere\n")
        sys.stderr.flush()
    return FAILED if lost and not code else code


def protect_output() -> list[Output]:
    """Make this process's standard output and error drop what cannot be written, and never raise.

    A stream that is closed leads to the null device, so that no file of the run takes its descriptor. A character that
    the encoding lacks is written as an escape sequence.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free, which is this one
    outputs = []
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # Windows' own console has no file descriptor
        if stream is None or (isinstance(stream, io.TextIOWrapper) and _is_file(stream)):
            output = Output(1 if name == "stdout" else 2)
            setattr(sys, name, output.text(stream))
            outputs.append(output)
    return outputs


def _is_file(stream: io.TextIOWrapper) -> bool:
    raw = getattr(stream.buffer, "raw", stream.buffer)
    return type(raw) is io.FileIO


class Output(io.FileIO):
    """A standard stream whose writes cannot fail; after the first that does, all is dropped."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._error: OSError | None = None
        self._text: io.TextIOWrapper | None = None

    def text(self, before: io.TextIOWrapper | None) -> io.TextIOWrapper:
        """This stream for texts, encoded and buffered as the one before."""
        self._text = io.TextIOWrapper(
            io.BufferedWriter(self),
            encoding=before.encoding if before else "utf-8",
            errors="backslashreplace",
            line_buffering=before is None or before.line_buffering or before.write_through,
        )
        return self._text

    def write(self, content: object) -> int:
        """Write all that can be written; returns the length of the content."""
        view = memoryview(content).cast("B")  # type: ignore[arg-type]
        done = 0
        while self._error is None and done < len(view):
            try:
                written = super().write(view[done:])
                if written is None:  # somebody has made the descriptor non-blocking
                    select.select([], [self], [])
                done += written or 0
            except OSError as error:
                self._error = error
        return len(view)

    def finish(self) -> OSError | None:
        """Write what is buffered; the error for which something was dropped, if any."""
        if self._text is not None:
            self._text.flush()
        return self._error


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
