"""Runs a command whose output may be closed, cut off or unable to show a character."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Callable

from harness.stopping import end_with_parent

FAILED = 1
# the reader is gone: a pipe that was closed, a terminal that hung up
GONE = (errno.EPIPE, errno.EIO)


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
