"""Standard output and error of a run, which ignore errors so that a failed print does not end the run.

A print can fail because the reader of a pipe is gone (Ctrl-C also ends the `tee` after a run), a terminal was closed,
or the disk of a log is full. None of these should lose the state of a run, in particular while it is being saved.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class SteadyStream:
    """Wraps a text stream and drops text that cannot be written; otherwise behaves like the stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._has_failed = False

    def write(self, text: str) -> int:
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._dropping():
            self._stream.flush()

    def end(self) -> None:
        """Redirects further output to the null device if a write has failed."""
        self.flush()
        if self._has_failed:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self._has_failed = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def steady_output() -> Iterator[None]:
    """While the block runs, `sys.stdout` and `sys.stderr` never fail, and neither does their flush at exit."""
    before = sys.stdout, sys.stderr
    # None if the parent process closed them.
    steady = [stream and SteadyStream(stream) for stream in before]
    sys.stdout, sys.stderr = steady
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in filter(None, steady):
            stream.end()
