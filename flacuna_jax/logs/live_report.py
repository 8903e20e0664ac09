"""report.html while a run goes on: written again now and then, never so often that the run would feel it."""

import time
from collections.abc import Callable

SECONDS = 30.0
SHARE = 0.02
"""At most this part of the time is spent on it."""


class LiveReport:
    """One that cannot be written ends no run, and does not change how one ended.

    Args: `write` writes the report with the status it is given; `say` is told of a failure.
    """

    def __init__(
        self, write: Callable[[str], None], say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write, self._say, self._clock = write, say, clock
        self._not_before = -1.0
        self._failed = False

    def refresh(self) -> None:
        """Writes it, if the last time is long enough ago."""
        began = self._clock()
        if self._failed or began < self._not_before:
            return
        self._failed = not self._try("running")
        now = self._clock()
        self._not_before = now + max(SECONDS, (now - began) / SHARE)

    def finish(self, status: str) -> None:
        """Writes it for the last time."""
        self._try(status)

    def _try(self, status: str) -> bool:
        try:
            self._write(status)
        except Exception as error:
            self._say(f"warning: no report of a run that is {status}: {error}")
            return False
        return True
