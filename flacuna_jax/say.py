"""Messages for the user."""

import sys
from collections.abc import Callable

Say = Callable[[str], None]
"""Receives messages for the user; hosts other than the first print nothing."""


def say_at_once(text: str) -> None:
    """Prints and flushes, so that a log file is up to date and complete if the process is killed."""
    print(text, flush=True)


def say_on_stderr(text: str) -> None:
    """For commands that print their result on standard output."""
    print(text, file=sys.stderr)


def say_nothing(text: str) -> None:
    del text
