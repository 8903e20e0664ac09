"""Finds tool calls in answers, in the form in which the model's template writes them."""

import dataclasses
import json
from typing import Any

from flacuna_jax.data.conversation import Conversation, Template, TemplateRefusal, Turn, render

_NAME, _KEY = "probe_function", "probe_argument"


@dataclasses.dataclass(frozen=True)
class CallForm:
    """A call is the text `opening`, a JSON object, and the text `closing`.

    Attributes:
      name, arguments: keys of the function's name and of its arguments in the object.
    """

    opening: str
    closing: str
    name: str
    arguments: str

    @classmethod
    def of(cls, template: Template) -> "CallForm | None":
        """The form in which a template writes a call; None if it does not write calls as JSON objects."""
        call = {"type": "function", "function": {"name": _NAME, "arguments": {_KEY: 1}}}
        turns = (Turn("user", "x"), Turn("assistant", "", extra={"tool_calls": [call]}))
        tool = {"type": "function", "function": {"name": _NAME, "parameters": {"type": "object", "properties": {}}}}
        try:
            segments = render(Conversation("", "", turns, None, (tool,)), template)
        except TemplateRefusal:
            return None
        text = "".join(segment.text for segment in segments if segment.supervised and segment.token is None)
        for begin in (index for index, character in enumerate(text) if character == "{"):
            found = _object_at(text, begin)
            if found is None:
                continue
            value, end = found
            name = next((key for key, part in value.items() if part == _NAME), None)
            arguments = next((key for key, part in value.items() if part == {_KEY: 1}), None)
            if name and arguments:
                return cls(text[:begin].strip(), text[end:].strip(), name, arguments)
        return None

    def parse(self, text: str) -> tuple[str, list[tuple[str, Any]]]:
        """The text before the first call, and the calls: names and arguments. Without a whole call, the text itself."""
        calls: list[tuple[str, Any]] = []
        said, at = text, 0
        while (begin := self._begin(text, at)) is not None:
            found = _object_at(text, text.find("{", begin))
            if found is None or not {self.name, self.arguments} <= found[0].keys():
                break
            if not calls:
                said = text[:begin].rstrip()
            value, at = found
            calls.append((str(value[self.name]), value[self.arguments]))
        return said, calls

    def certain(self, text: str) -> str:
        """The part of a text in which no call can begin."""
        if not self.opening:
            return "" if text.lstrip()[:1] in ("", "{") else text
        if self.opening in text:
            return text[: text.index(self.opening)].rstrip()
        held = max((n for n in range(1, len(self.opening)) if text.endswith(self.opening[:n])), default=0)
        return text[: len(text) - held].rstrip()

    def _begin(self, text: str, at: int) -> int | None:
        """The begin of the next call: its opening, or, without one, an object that is the first of the text left."""
        if self.opening:
            begin = text.find(self.opening, at)
            return None if begin < 0 else begin
        rest = text[at:].lstrip(" \n;,")
        return len(text) - len(rest) if rest.startswith("{") else None


def _object_at(text: str, begin: int) -> tuple[dict[str, Any], int] | None:
    """The JSON object at a place of a text, and its end."""
    if begin < 0:
        return None
    try:
        value, end = json.JSONDecoder().raw_decode(text, begin)
    except (ValueError, RecursionError):
        return None
    return (value, end) if isinstance(value, dict) else None
