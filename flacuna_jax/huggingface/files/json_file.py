"""JSON objects from files, with one message for whatever is wrong."""

import json
from pathlib import Path
from typing import Any

from flacuna_jax.errors import UserError
from flacuna_jax.git_lfs import require_content


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; `UserError` where it is missing, torn or something else."""
    try:
        require_content(path)
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors put a byte-order mark in front
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, where an object is expected")
    return value
