"""Where a checkpoint is expected to lie."""

import re
from pathlib import Path

from flacuna_jax.errors import UserError


def require_directory(path: str | Path) -> Path:
    """The path. Raises `UserError` where no directory is; a name as the hub has them is told how to fetch it."""
    if Path(path).is_dir():
        return Path(path)
    fetch = ""
    if not Path(path).exists() and re.fullmatch(r"[\w-]+/[\w.-]+", str(path)):
        fetch = f"; if it is a name of the Hugging Face hub: hf download {path} --local-dir models/{Path(path).name}"
    raise UserError(f"{path} is not a directory; a checkpoint directory is expected{fetch}")
