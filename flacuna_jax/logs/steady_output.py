"""Standard output and error of a run, which goes on when nobody can be told any more.

A pipe whose reader is gone (Ctrl-C in a terminal ends the `tee` behind a run, too), a terminal that was closed, a full
disk under a log: a print that fails is no reason to lose what a run has learned, least of all while it saves.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO


class SteadyStream:
    """A text stream that drops what cannot be written; in all else the stream it is given."""

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
        """Lets what is still to come go nowhere, if something could not be written."""
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
    """While the block runs, `sys.stdout` and `sys.stderr` never fail; nor does their last flush as the process ends."""
    before = sys.stdout, sys.stderr
    # None where who started the process closed them.
    steady = [stream and SteadyStream(stream) for stream in before]
    sys.stdout, sys.stderr = steady
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in filter(None, steady):
            stream.end()
