"""The content of a record, which of its fields a parser has used, and its errors."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from flacuna_jax.data.segments import Turn


class Dialogue(NamedTuple):
    """The content of a record.

    Attributes:
      system: The system text. None without one.
      turns: The conversation; in a pair, the one with the chosen answer.
      tools: Schemas of the tools.
      rejected: The conversation with the rejected answer. None if the record is not a pair.
      good: The label of the answer. None if it has none.
    """

    system: str | None
    turns: list[Turn]
    tools: tuple[Mapping[str, Any], ...] = ()
    rejected: list[Turn] | None = None
    good: bool | None = None


class BadRecord(Exception):
    """An invalid record: the `reason` under which it is counted, and the details."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclasses.dataclass
class Reading:
    """The fields of a record, and how they were used.

    Attributes:
      used: Names of the fields that a parser has looked at.
      ignored: Names of keys inside fields, such as messages[].id, that were not used.
      changed: Conversions of parts of the record.
    """

    record: Mapping[str, Any]
    used: set[str] = dataclasses.field(default_factory=set)
    ignored: list[str] = dataclasses.field(default_factory=list)
    changed: list[str] = dataclasses.field(default_factory=list)

    def take(self, name: str) -> Any:
        """Returns the value of a field and marks it as used; None if the record does not have it."""
        self.used.add(name)
        return self.record.get(name)

    def text(self, name: str) -> str:
        """A field that must be text. Raises BadRecord if it is not."""
        value = self.take(name)
        if not isinstance(value, str):
            raise self.wrong_type(name, "text")
        return value

    def wrong_type(self, name: str, needed: str) -> BadRecord:
        """The error for a field that is missing or is not `needed`."""
        what = f"not {kind_name(self.record[name])}" if name in self.record else "and is missing"
        return BadRecord("wrong type", f"{name!r} must be {needed}, {what}")

    def optional_text(self, name: str) -> str | None:
        """A field that may be absent or null. Raises BadRecord if it is anything but text."""
        return None if self.take(name) is None else self.text(name)

    def first(self, *names: str) -> str | None:
        """The first of `names` that has a value in the record."""
        return next((name for name in names if self.record.get(name) is not None), None)

    def unused(self) -> list[str]:
        """Non-empty fields that were not used."""
        return [name for name, value in self.record.items() if name not in self.used and not is_empty(value)]


def is_empty(value: object) -> bool:
    return value is None or (value in ("", [], {}) and not isinstance(value, bool))


def kind_name(value: object) -> str:
    """The kind of a JSON value, for messages."""
    names = {type(None): "null", dict: "an object", list: "a list", bool: "true or false", int: "a number", str: "text"}
    return names.get(type(value), "a number" if isinstance(value, float) else type(value).__name__)


def decoded(value: Any, what: str) -> Any:
    """Decodes a list or object if a file has it as JSON text, as in tables. Raises BadRecord if it is not JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        text = value.strip()
        hint = ""
        if text.startswith(("[{'", "{'", '[{"')):
            hint = "; it looks like a Python repr, as written by to_csv: write the data as .jsonl or .parquet"
        shown = text[:40] + ("..." if len(text) > 40 else "")
        raise BadRecord("wrong type", f"{what} is the text {shown!r}, which is not JSON{hint}") from None
