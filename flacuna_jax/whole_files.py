"""Files that are written whole or not at all: a reader, or the next start, sees the old or the new content."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flacuna_jax.errors import UserError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; at the end of the block, what is there becomes `path` and is on the disk.

    Directories are created. If the block raises, `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of this process alone: two that write the same file both leave a whole one.
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield partial
        _force_to_disk(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    _force_to_disk(path.parent)


def write_atomically(path: Path, text: str) -> None:
    """Replaces the content of a text file, UTF-8.

    Raises:
      UserError: it cannot be written (no space, no permission); the old content stays.
    """
    try:
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def _force_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
