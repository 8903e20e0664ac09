"""Reads JSON objects from files, with a UserError for every fault."""

import json
from pathlib import Path
from typing import Any

from flacuna_jax.errors import UserError
from flacuna_jax.git_lfs import require_content


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file. Raises `UserError` if the file is missing, damaged or not an object."""
    try:
        require_content(path)
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors write a byte-order mark
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} contains a {type(value).__name__}, but must contain an object")
    return value
