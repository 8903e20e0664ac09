"""Distinguishes errors between a checkpoint and its disk or bucket: not readable, full, missing, or damaged."""

import contextlib
import errno
import gc
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
from etils import epath

from flacuna_jax.errors import UserError
from flacuna_jax.storage.bucket import is_bucket

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_CLOSED = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE)
_GONE = (errno.ESTALE, errno.ENOTCONN, errno.ENODEV)
"""Error numbers of network mounts whose server is unavailable."""


class UnreadableCheckpoint(Exception):
    """A checkpoint that exists but is torn, or whose bytes differ from the saved ones."""


@contextlib.contextmanager
def read_errors(directory: epath.Path) -> Iterator[None]:
    """Converts exceptions of many kinds to UnreadableCheckpoint. Exceptions for a lack of memory, permission or file
    descriptors, and of a bucket that does not answer, do not mean that a checkpoint is damaged."""
    failure: Exception | None = None
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        in_words = " ".join(str(error).split())
        if known := _system_reason(error, *_CLOSED, *_GONE):
            failure = UserError(f"{directory} cannot be read: {known}")
        elif is_bucket(directory) and _is_outage(error):
            failure = UserError(f"{directory} cannot be read: {in_words[:300]}")
        elif "RESOURCE_EXHAUSTED" in in_words:
            raise
        else:
            failure = UnreadableCheckpoint(f"{type(error).__name__}: {in_words[:200]}")
    if failure is not None:
        _collect_abandoned_reads()
        raise failure


def _collect_abandoned_reads() -> None:
    """Discards the unfinished reads of a failed restore, each of which would print a traceback when it is finalised."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        with warnings.catch_warnings(action="ignore"):
            gc.collect()
    finally:
        sys.unraisablehook = hook


def ignore_late_callbacks() -> None:
    """Suppresses output for writes that complete after their save has failed.

    TensorStore's threads then call into a closed event loop, once for each array, and Python would print a traceback
    each time, around the message with the reason of the failure.
    """
    hook = sys.unraisablehook
    if getattr(hook, "ignores_late_callbacks", False):
        return

    def without_late_callbacks(unraisable: "sys.UnraisableHookArgs") -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
            hook(unraisable)

    without_late_callbacks.ignores_late_callbacks = True  # type: ignore[attr-defined]
    sys.unraisablehook = without_late_callbacks


def _is_outage(error: Exception) -> bool:
    """Whether a bucket did not answer or denied access; a missing object is a different error."""
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        return True
    words = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "PERMISSION_DENIED", "UNAUTHENTICATED", "HttpError")
    return any(word in f"{type(error).__name__} {error}" for word in words)


@contextlib.contextmanager
def write_errors(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        known = _system_reason(error, *_FULL, *_CLOSED, *_GONE, errno.EIO)
        if known is None and not isinstance(error, OSError) and not is_bucket(path):
            raise
        raise UserError(f"checkpoint {path} cannot be written: {known or error}; earlier ones are intact") from error


def _system_reason(error: Exception, *numbers: int) -> str | None:
    """The system's message for an error, if it has one of these numbers. TensorStore reports such errors as ValueErrors
    that contain the message, and too many open files as exhausted resources."""
    return next((reason for reason in map(os.strerror, numbers) if reason in str(error)), None)


def force_to_disk(directory: epath.Path) -> None:
    """fsyncs a finished checkpoint, so that a power cut cannot empty it after older ones are deleted."""
    if jax.process_index() != 0 or is_bucket(directory):
        return
    for path in (*Path(directory).rglob("*"), directory, directory.parent):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
