"""Checks the directory of a checkpoint."""

import re
from pathlib import Path

from flacuna_jax.errors import UserError
from flacuna_jax.hub_cache import require_no_cache_directory

LOCAL = (".", "..", "checkpoints", "models", "runs")
"""Common names of local directories, which are not owners on the Hub."""


def require_directory(path: str | Path) -> Path:
    """Returns the path. Raises `UserError` if it is not a directory; for a Hub name, the message has the download
    command."""
    if Path(path).is_dir():
        require_no_cache_directory(Path(path))
        return Path(path)
    fetch = ""
    if not Path(path).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        first, name = str(path).split("/")
        of_hub = first not in LOCAL and not Path(first).is_dir()
        source, target = (path, f"models/{name}") if of_hub else ("NAME", path)
        fetch = f"; to download it from the Hugging Face Hub: hf download {source} --local-dir {target}"
    raise UserError(f"{path} is not a directory; give a checkpoint directory{fetch}")
