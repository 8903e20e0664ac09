"""Hashes of the inputs of a build: its settings, its input files, the code. Equal hashes mean equal output."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flacuna_jax.errors import UserError
from flacuna_jax.flan_mini.config import FlanMiniConfig

_NO_EFFECT = ("output_dir", "workers", "leakage", "batch_size", "tokenizer", "template", "family_templates")
"""Settings that do not change the records, or are paths, of which only the content counts."""
_PATHS = ("path", "templates")


def file_hash(path: Path) -> str:
    """SHA-256 of a file. Raises UserError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def settings_that_count(config: FlanMiniConfig) -> dict[str, Any]:
    tree = config.model_dump(mode="json")
    tree["sources"] = [{k: v for k, v in source.items() if k not in _PATHS} for source in tree["sources"]]
    return {name: value for name, value in tree.items() if name not in _NO_EFFECT}


def build_key(parts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The differences between two trees of settings or hashes, as dotted names."""
    found: list[str] = []
    for name in sorted({*old, *new}):
        before, after = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{name}.")
        elif isinstance(before, Sequence) and isinstance(after, Sequence) and not isinstance(before, str):
            old_items, new_items = ({str(i): v for i, v in enumerate(side)} for side in (before, after))
            found += differences(old_items, new_items, f"{prefix}{name}.")
        elif before != after:
            found.append(f"{prefix}{name}")
    return found
