"""The frame of every command: exit codes, one-line errors, signals, output that cannot fail.

A command's ``main`` parses its options and hands its work to `exit_code`; ``__main__`` calls it through `run_command`.
"""

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

from attacks.types import EstimatorError, UnsoundError
from harness.config.options import ConfigError

DONE, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
# errors of a write to a closed pipe or to a terminal that hung up
READER_GONE = (errno.EPIPE, errno.EIO)
# environment variable of a child process, which ends when its standard input is closed
CHILD = "MARGIN_HARNESS_CHILD"


def exit_code(command: str, work: Callable[[], int], *, resume: str, debug: bool = False) -> int:
    """Call a command's work and return the exit code; an error becomes one line on standard error.

    SIGTERM interrupts the work as Ctrl-C does.

    Args:
        command: name that the line begins with, such as ``track``.
        work: returns `DONE` or `FAILED`.
        resume: what to do after an interruption, or what is left behind; ends the line "COMMAND: interrupted; ...".
        debug: raise errors with their tracebacks instead.

    Returns:
        What ``work`` returns; `USAGE` after ConfigError and EstimatorError, `FAILED` after other ValueErrors, OSError
        and UnsoundError, `INTERRUPTED` after an interruption. Other errors are bugs and are raised.
    """
    try:
        with terminated_is_interrupted():
            return work()
    except (ValueError, OSError, UnsoundError) as error:
        if debug:
            raise
        print_error(command, error)
        return USAGE if isinstance(error, ConfigError | EstimatorError) else FAILED
    except KeyboardInterrupt:
        _write_line(f"{command}: interrupted; {resume}")
        return INTERRUPTED


def print_error(command: str, error: object) -> None:
    """Print ``COMMAND: error: ...`` to standard error, in one line."""
    _write_line(f"{command}: error: {' '.join(str(error).split())}")


def _write_line(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def run_command(main: Callable[[], int | None]) -> int:
    """Run a command's ``main`` with output that cannot fail, and return the exit code.

    Output that cannot be written is dropped. A reader that is gone (a closed pipe) is not a failure. Output lost for
    another reason, such as a full disk, is reported at the end and makes the exit code at least 1.
    """
    end_with_parent()
    outputs = protect_output()
    try:
        code = main() or 0
    except SystemExit as ended:  # argparse's
        code = ended.code if isinstance(ended.code, int) else FAILED if ended.code else 0
    lost = [error for output in outputs if (error := output.finish()) is not None and error.errno not in READER_GONE]
    if lost:
        _write_line(f"error: output was lost: {lost[0]}; make room, or send it elsewhere")
    return FAILED if lost and not code else code


def protect_output() -> list[Output]:
    """Make this process's standard output and error drop what cannot be written, and never raise.

    A closed stream is opened on the null device; otherwise a file of the run could get its descriptor. A character that
    the encoding lacks is written as an escape sequence.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor, this one
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
    """A standard stream that never raises; after the first failed write, everything is dropped."""

    def __init__(self, descriptor: int) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._error: OSError | None = None
        self._text: io.TextIOWrapper | None = None

    def text(self, before: io.TextIOWrapper | None) -> io.TextIOWrapper:
        """A text layer over this stream, with the encoding and buffering of the stream that it replaces."""
        self._text = io.TextIOWrapper(
            io.BufferedWriter(self),
            encoding=before.encoding if before else "utf-8",
            errors="backslashreplace",
            line_buffering=before is None or before.line_buffering or before.write_through,
        )
        return self._text

    def write(self, content: object) -> int:
        """Write what can be written; always returns the full length of the content."""
        view = memoryview(content).cast("B")  # type: ignore[arg-type]
        done = 0
        while self._error is None and done < len(view):
            try:
                written = super().write(view[done:])
                if written is None:  # another process has made the descriptor non-blocking
                    select.select([], [self], [])
                done += written or 0
            except OSError as error:
                self._error = error
        return len(view)

    def finish(self) -> OSError | None:
        """Flush; return the error that made the stream drop output, if any."""
        if self._text is not None:
            self._text.flush()
        return self._error


@contextlib.contextmanager
def terminated_is_interrupted() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt; has no effect outside of the main thread."""
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
    """Let processes started in this context ignore Ctrl-C from the beginning; their parent handles it.

    Has no effect outside of the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def end_when(parent_ended: Callable[[], object]) -> None:
    """End this process, whatever it is doing, as soon as a call returns.

    Args:
        parent_ended: blocks until the parent's end of a pipe is closed, which happens even when the parent is killed.
    """
    threading.Thread(target=lambda: (parent_ended(), os._exit(1)), daemon=True).start()


def child_environment() -> dict[str, str]:
    """The environment of a child command that ends with this process.

    This process must hold a pipe to the child's standard input.
    """
    return {**os.environ, CHILD: "1"}


def end_with_parent() -> None:
    """If this process was started with `child_environment`, end it when its parent ends."""
    if os.environ.pop(CHILD, None):
        end_when(lambda: os.read(0, 1))
