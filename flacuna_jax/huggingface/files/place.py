"""Where a checkpoint is expected to lie."""

import re
from pathlib import Path

from flacuna_jax.errors import UserError
from flacuna_jax.hub_cache import require_no_cache_directory

LOCAL = (".", "..", "checkpoints", "models", "runs")
"""Where models lie on a disk, and nobody's name on the hub."""


def require_directory(path: str | Path) -> Path:
    """The path. Raises `UserError` where no directory is; a name as the hub has them is told how to fetch it."""
    if Path(path).is_dir():
        require_no_cache_directory(Path(path))
        return Path(path)
    fetch = ""
    if not Path(path).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        first, name = str(path).split("/")
        of_hub = first not in LOCAL and not Path(first).is_dir()
        source, target = (path, f"models/{name}") if of_hub else ("NAME", path)
        fetch = f"; one of the Hugging Face hub is fetched with: hf download {source} --local-dir {target}"
    raise UserError(f"{path} is not a directory; a checkpoint directory is expected{fetch}")
