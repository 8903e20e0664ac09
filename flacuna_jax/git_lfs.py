"""Git LFS pointers: small text files that replace content that a clone without Git LFS has not fetched."""

import re
from pathlib import Path

from flacuna_jax.errors import UserError

_START = b"version https://git-lfs.github.com/spec/"


def require_content(path: Path) -> None:
    """Raises UserError if `path` is a Git LFS pointer. An unreadable file passes, because its reader will report it."""
    try:
        with path.open("rb") as file:
            start = file.read(1024)
    except OSError:
        return
    if not start.startswith(_START):
        return
    size = re.search(rb"^size (\d+)$", start, re.MULTILINE)
    of_bytes = f" of {int(size[1]):,} bytes" if size else ""
    raise UserError(
        f"{path}: this is a Git LFS pointer, not the file{of_bytes} itself; "
        "run `git lfs install && git lfs pull` in its repository, or download the file again"
    )
