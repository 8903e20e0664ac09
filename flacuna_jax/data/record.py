"""A record while it is read: which of its fields were used, and what was found wrong."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any


class BadRecord(Exception):
    """A record that cannot be understood: a `reason` to count it under, and what exactly is wrong."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclasses.dataclass
class Reading:
    """The fields of a record, and what became of them.

    Attributes:
      used: Names of the fields that a parser has looked at.
      ignored: Names of keys inside fields, such as messages[].id, that were not used.
      changed: How parts of the record were read in another form than they have.
    """

    record: Mapping[str, Any]
    used: set[str] = dataclasses.field(default_factory=set)
    ignored: list[str] = dataclasses.field(default_factory=list)
    changed: list[str] = dataclasses.field(default_factory=list)

    def take(self, name: str) -> Any:
        """The value of a field, which then counts as used; None if the record does not have it."""
        self.used.add(name)
        return self.record.get(name)

    def text(self, name: str) -> str:
        """A field that must be text. Raises BadRecord."""
        value = self.take(name)
        if not isinstance(value, str):
            what = f"not {kind_name(value)}" if name in self.record else "and is missing"
            raise BadRecord("wrong type", f"{name!r} must be text, {what}")
        return value

    def optional_text(self, name: str) -> str | None:
        """A field that may be absent or null. Raises BadRecord if it is anything but text."""
        return None if self.take(name) is None else self.text(name)

    def first(self, *names: str) -> str | None:
        """The first of `names` that has a value in the record."""
        return next((name for name in names if self.record.get(name) is not None), None)

    def unused(self) -> list[str]:
        """Fields that hold something and that nothing has looked at."""
        return [name for name, value in self.record.items() if name not in self.used and not is_empty(value)]


def is_empty(value: object) -> bool:
    return value is None or (value in ("", [], {}) and not isinstance(value, bool))


def kind_name(value: object) -> str:
    """What a JSON value is, for messages."""
    names = {type(None): "null", dict: "an object", list: "a list", bool: "true or false", int: "a number", str: "text"}
    return names.get(type(value), "a number" if isinstance(value, float) else type(value).__name__)


def decoded(value: Any, what: str) -> Any:
    """A list or object that a file may hold as JSON text, as tables do. Raises BadRecord for text that is not JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        text = value.strip()
        hint = ""
        if text.startswith(("[{'", "{'", '[{"')):
            hint = "; it looks like Python's repr of a list, as to_csv writes it: write the data as .jsonl or .parquet"
        shown = text[:40] + ("..." if len(text) > 40 else "")
        raise BadRecord("wrong type", f"{what} is the text {shown!r}, which is not JSON{hint}") from None
