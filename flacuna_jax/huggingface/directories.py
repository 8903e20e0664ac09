"""Atomic creation of directories: complete or not at all."""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from flacuna_jax.errors import UserError


def check_target(target: Path, replace: bool = False) -> None:
    """Raises `UserError`, before any work is done, if writing to `target` would overwrite something."""
    if target.is_dir():
        if not replace and any(target.iterdir()):
            raise UserError(f"{target} exists and is not empty; choose a new directory, or delete it first")
    elif target.exists() or target.is_symlink():
        raise UserError(f"{target} exists and is not a directory; choose a new directory")


@contextlib.contextmanager
def whole_directory(target: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Yields a temporary directory next to `target`, which is renamed to `target` when the block ends without an error.

    An exception removes it. A killed process leaves `NAME.partial-…`, which is never mistaken for a finished directory.

    Args:
      target: final path; must not exist, or be empty.
      replace: whether to replace an existing directory of that name (it stays until the new one is complete). The
        caller must prevent concurrent writers; remains of killed processes are removed.

    Raises:
      UserError: the target already exists, or its parent is full or cannot be written to.
    """
    target = Path(target)
    check_target(target, replace)
    if replace:
        _remove_leftovers(target, "partial")
    partial = target.with_name(f"{target.name}.partial-{secrets.token_hex(4)}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{partial} cannot be created: {error.strerror}") from None
    try:
        yield partial
        _flush(partial)
        _rename(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and _is_of_writing(error, target.parent):
            raise UserError(f"{target} cannot be written: {error.strerror}") from None
        raise
    if replace:
        _remove_leftovers(target, "retired")


def _is_of_writing(error: OSError, directory: Path) -> bool:
    """Whether an error is about writing below `directory`, not about a file that is read. The error of a full disk has
    no file name."""
    if error.filename is None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
    return Path(os.fsdecode(error.filename)).is_relative_to(directory)


def _remove_leftovers(target: Path, kind: str) -> None:
    for left in target.parent.glob(f"{target.name}.{kind}-*"):
        shutil.rmtree(left, ignore_errors=True)


def _flush(directory: Path) -> None:
    for path in [*directory.rglob("*"), directory]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _rename(partial: Path, target: Path) -> None:
    retired = None
    if target.is_dir() and any(target.iterdir()):
        retired = target.with_name(f"{target.name}.retired-{secrets.token_hex(4)}")
        target.rename(retired)
    partial.rename(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if retired is not None:
        shutil.rmtree(retired)
