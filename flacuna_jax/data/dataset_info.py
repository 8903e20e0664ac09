"""LLaMA-Factory's dataset_info.json: the meaning of the fields of a file.

    {"my_data": {"file_name": "my.json", "formatting": "sharegpt", "columns": {"messages": "dialog"}, "tags": {...}}}

Its keys and defaults are those of LLaMA-Factory's data/README.md.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from flacuna_jax.errors import UserError

NAME = "dataset_info.json"

_REMOTE = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_DEFAULT_COLUMNS: Mapping[str, Mapping[str, str]] = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output"},
    "sharegpt": {"messages": "conversations"},
}
_DEFAULT_TAGS: Mapping[str, str] = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_KNOWN_COLUMNS = frozenset(
    (
        *("prompt", "query", "response", "history", "messages", "system", "tools"),
        *("images", "videos", "audios", "chosen", "rejected", "kto_tag"),
    )
)


@dataclasses.dataclass(frozen=True)
class FileDescription:
    """The entry of a file in dataset_info.json. `columns` maps LLaMA-Factory's name of a field to the file's name."""

    name: str
    formatting: Literal["alpaca", "sharegpt"]
    columns: Mapping[str, str]
    tags: Mapping[str, str]
    ranking: bool


def read_descriptions(directory: Path) -> dict[Path, FileDescription]:
    """The entries of a directory's dataset_info.json by file; empty without one, or for the one `datasets` writes.

    Raises UserError for an entry that LLaMA-Factory would not accept.
    """
    path = directory / NAME
    try:
        tree: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(tree, dict):
        return {}
    entries = {name: entry for name, entry in tree.items() if isinstance(entry, dict) and _is_entry(entry)}
    found: dict[Path, FileDescription] = {}
    for name, entry in entries.items():
        if not isinstance(entry.get("file_name"), str):
            continue
        description = _describe(path, name, entry)
        target = directory / entry["file_name"]
        for file in sorted(target.rglob("*")) if target.is_dir() else [target]:
            if (
                file in found
                and not found[file].ranking
                and dataclasses.replace(description, name="") != (dataclasses.replace(found[file], name=""))
            ):
                raise UserError(f"{path}: {found[file].name!r} and {name!r} describe {file.name} differently")
            found[file] = description
    return found


def _is_entry(entry: Mapping[str, Any]) -> bool:
    return "file_name" in entry or any(key in entry for key in _REMOTE)


def _describe(path: Path, name: str, entry: Mapping[str, Any]) -> FileDescription:
    formatting = entry.get("formatting", "alpaca")
    if formatting not in _DEFAULT_COLUMNS:
        raise UserError(f"{path}: {name!r}: formatting is {formatting!r}; it must be alpaca or sharegpt")
    columns = _texts(path, name, "columns", entry.get("columns"), _KNOWN_COLUMNS)
    tags = _texts(path, name, "tags", entry.get("tags"), frozenset(_DEFAULT_TAGS))
    # As in LLaMA-Factory, a description with columns lists every column to use; there are no defaults then.
    return FileDescription(
        name,
        formatting,
        columns or _DEFAULT_COLUMNS[formatting],
        {**_DEFAULT_TAGS, **tags},
        bool(entry.get("ranking")),
    )


def _texts(path: Path, name: str, key: str, value: Any, known: frozenset[str]) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise UserError(f"{path}: {name!r}: {key} must map names to field names")
    unknown = sorted(set(value) - known)
    if unknown:
        raise UserError(
            f"{path}: {name!r}: {key} has the unknown name {unknown[0]!r}; known are {', '.join(sorted(known))}"
        )
    return value
