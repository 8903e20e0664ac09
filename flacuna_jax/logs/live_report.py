"""Rewrites report.html during a run, at intervals long enough not to slow down training."""

import time
from collections.abc import Callable

SECONDS = 30.0
SHARE = 0.02
"""Maximum share of time spent on writing reports."""


class LiveReport:
    """Writes a report during and after a run. A failure to write never ends the run or changes how it ended.

    Args:
      write: writes the report with the given status.
      say: receives a warning if writing fails.
      clock: current time in seconds.
    """

    def __init__(
        self, write: Callable[[str], None], say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._write, self._say, self._clock = write, say, clock
        self._not_before = -1.0
        self._failed = False

    def refresh(self) -> None:
        """Writes the report if the last one is old enough."""
        began = self._clock()
        if self._failed or began < self._not_before:
            return
        self._failed = not self._try("running")
        now = self._clock()
        self._not_before = now + max(SECONDS, (now - began) / SHARE)

    def finish(self, status: str) -> None:
        """Writes the final report."""
        self._try(status)

    def _try(self, status: str) -> bool:
        try:
            self._write(status)
        except Exception as error:
            self._say(f"warning: report.html could not be written (status: {status}): {error}")
            return False
        return True
