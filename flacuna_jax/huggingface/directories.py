"""Directories that appear whole or not at all."""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from flacuna_jax.errors import UserError


def check_target(target: Path, replace: bool = False) -> None:
    """Raises `UserError` where writing to `target` would overwrite something, before any work is done for it."""
    if target.is_dir():
        if not replace and any(target.iterdir()):
            raise UserError(f"{target} exists and is not empty; name a new directory, or delete it first")
    elif target.exists() or target.is_symlink():
        raise UserError(f"{target} exists and is not a directory; name a new directory")


@contextlib.contextmanager
def whole_directory(target: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Gives a directory beside `target` to write into; it takes the target's name when the block ends without error.

    An exception removes it. A killed process leaves `NAME.partial-…`, which nothing takes for a finished one.

    Args:
      target: final name; must not exist, or be empty.
      replace: whether a finished directory of that name gives way (it stays until the new one is complete). The caller
        sees to it that nobody else writes there; what killed processes left of their attempts is removed.

    Raises:
      UserError: the target is in the way, or its parent cannot be written to, or is full.
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
    """Whether it comes from below `directory`, and not from a file that is read. A full disk names no file."""
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
