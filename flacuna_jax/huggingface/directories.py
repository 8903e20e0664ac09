"""Directories that appear whole or not at all."""

import contextlib
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
      replace: whether a finished directory of that name gives way (it stays until the new one is complete).

    Raises:
      UserError: the target is in the way, or its parent cannot be written to.
    """
    target = Path(target)
    check_target(target, replace)
    partial = target.with_name(f"{target.name}.partial-{secrets.token_hex(4)}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{partial} cannot be created: {error.strerror}") from None
    try:
        yield partial
        _flush(partial)
        _rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


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
