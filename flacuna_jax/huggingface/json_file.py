"""JSON objects from files, with one message for whatever is wrong."""

import json
from pathlib import Path
from typing import Any

from flacuna_jax.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; `UserError` where it is missing, torn or something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, where an object is expected")
    return value
