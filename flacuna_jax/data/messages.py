"""Converts lists of messages to turns: dialects of roles, content in parts, tool calls, reasoning, loss per message.

A message is an object with a role (`role` or `from`) and a text (`content`, `value` or `text`). It may also have

- tool_calls, tool_call_id, name, reasoning_content, thinking, reasoning: kept in `Turn.extra` for the template;
- weight, train, loss, training: whether an assistant's message carries loss. null means that it is not set.

`Reading.ignored` lists the other keys of a message.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from flacuna_jax.data.record import BadRecord, Reading, decoded, is_empty, kind_name
from flacuna_jax.data.segments import Role, Turn

ROLES: Mapping[str, Role] = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool_calls": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "ipython": "tool",
}
"""Names of roles, in lower case, in the formats of OpenAI, ShareGPT and their dialects."""
CALL_ROLES = frozenset({"function_call", "tool_call", "tool_calls"})
"""Roles whose text is a function call in JSON."""

_ROLE_KEYS = ("role", "from")
_TEXT_KEYS = ("content", "value", "text")
_LOSS_KEYS = ("weight", "train", "loss", "training")
_EXTRA_TEXTS = ("tool_call_id", "name", "reasoning_content", "thinking", "reasoning")

ARGUMENTS_DECODED = "arguments of tool calls decoded from JSON text"
CALLS_WRAPPED = "tool calls or tools converted to {type: function, function: ...}"
RESULTS_ENCODED = "results of tools written as JSON text"


def read_messages(
    reading: Reading,
    field: str,
    roles: Mapping[str, Role] = ROLES,
    calls: frozenset[str] = CALL_ROLES,
    keys: tuple[str, str] = ("role", "content"),
) -> tuple[str | None, list[Turn]]:
    """The leading system text, or None, and the turns of a field that contains a list of messages.

    Args:
      roles: Names of the roles in the dialect, in lower case.
      calls: Those of these names whose text is a function call.
      keys: Keys of the role and the text in a message, which take precedence over the usual ones.

    Raises:
      BadRecord: The field is not a list of messages, or one of them is invalid.
    """
    entries = decoded(reading.take(field), repr(field))
    if not isinstance(entries, list):
        raise BadRecord("wrong type", f"{field!r} must be a list of turns, not {kind_name(entries)}")
    turns = [
        _plain_turn(entry, roles, calls) or _Message(reading, field, index, entry, roles, calls, keys).turn()
        for index, entry in enumerate(entries)
    ]
    if turns and turns[0].role == "system":
        return turns[0].text or None, turns[1:]
    return None, turns


def read_tools(reading: Reading, *fields: str) -> tuple[Mapping[str, Any], ...]:
    """The function schemas in the first non-empty one of `fields`: a list of objects, or its JSON text."""
    field = reading.first(*fields)
    if field is None:
        return ()
    value = reading.take(field)
    if isinstance(value, str) and not value.strip():
        return ()
    tools = decoded(value, repr(field))
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRecord("wrong type", f"{field!r} must be a list of objects that describe functions")
    return tuple(_as_function(reading, tool, f"tool {number} in {field!r}") for number, tool in enumerate(tools, 1))


def without_loss(turns: Sequence[Turn]) -> list[Turn]:
    return [replace(turn, trained=False) for turn in turns]


def _plain_turn(entry: Any, roles: Mapping[str, Role], calls: frozenset[str]) -> Turn | None:
    """The turn of a message with only a role and a text, which nearly all messages are; reads them ten times faster."""
    if type(entry) is not dict or len(entry) != 2:
        return None
    name, text = entry.get("role") or entry.get("from"), entry.get("content") or entry.get("value")
    if type(name) is not str or type(text) is not str or name in calls:
        return None
    role = roles.get(name)
    return None if role is None else Turn(role, text)


class _Message:
    """One entry of a list of messages."""

    def __init__(
        self,
        reading: Reading,
        field: str,
        index: int,
        entry: Any,
        roles: Mapping[str, Role],
        calls: frozenset[str],
        keys: tuple[str, str],
    ) -> None:
        self._where = f"turn {index + 1}"
        if not isinstance(entry, dict):
            raise BadRecord("wrong type", f"{self._where} must be an object, not {kind_name(entry)}")
        self._reading, self._field, self._entry = reading, field, entry
        self._roles, self._calls = roles, calls
        self._role_keys = (keys[0], *_ROLE_KEYS)
        self._text_keys = (keys[1], *_TEXT_KEYS)
        self._used: set[str] = set()

    def turn(self) -> Turn:
        name = self._role_name()
        role = self._roles[name]
        extra: dict[str, Any] = {}
        if calls := self._tool_calls():
            extra["tool_calls"] = calls
        for key in _EXTRA_TEXTS:
            value = self._take(key)
            if value is not None and not isinstance(value, str):
                raise BadRecord("wrong type", f"{key!r} of {self._where} must be text, not {kind_name(value)}")
            if value:
                extra[key] = value
        text = self._text(role, may_be_absent="tool_calls" in extra)
        if name in self._calls:
            extra["tool_calls"] = self._calls_in(text)
            text = ""
        trained = self._trained(role)
        self._reading.ignored += [
            f"{self._field}[].{key}"
            for key, value in self._entry.items()
            if key not in self._used and not is_empty(value)
        ]
        return Turn(role, text, trained, extra or None)

    def _take(self, key: str) -> Any:
        self._used.add(key)
        return self._entry.get(key)

    def _role_name(self) -> str:
        key = next((key for key in self._role_keys if self._entry.get(key) is not None), None)
        if key is None:
            raise BadRecord(
                "unknown role",
                f"{self._where} has neither `role` nor `from` (its fields: {', '.join(self._entry) or 'none'})",
            )
        name = self._take(key)
        known = name.strip().lower() if isinstance(name, str) else ""
        if known not in self._roles:
            listed = ", ".join(sorted(self._roles))
            raise BadRecord("unknown role", f"{self._where} has unknown {key} {name!r} (known: {listed})")
        return known

    def _text(self, role: Role, may_be_absent: bool) -> str:
        key = next((key for key in self._text_keys if self._entry.get(key) is not None), None)
        if key is None:
            if may_be_absent:
                self._used.update(self._text_keys)
                return ""
            present = next((key for key in self._text_keys if key in self._entry), None)
            if present is not None:
                raise BadRecord("wrong type", f"{present!r} of {self._where} must be text, not null")
            raise BadRecord(
                "wrong type",
                f"{self._where} has no text; put it in `content` or `value` (its fields: {', '.join(self._entry)})",
            )
        value = self._take(key)
        if isinstance(value, str):
            return value
        if role == "tool" and isinstance(value, dict | list) and not _are_parts(value):
            self._reading.changed.append(RESULTS_ENCODED)
            return json.dumps(value, ensure_ascii=False)
        return _join_parts(value, f"{key!r} of {self._where}")

    def _tool_calls(self) -> list[dict[str, Any]]:
        """The calls in `tool_calls`, or in OpenAI's older `function_call`."""
        calls, old = self._take("tool_calls"), self._take("function_call")
        if is_empty(calls):
            calls = None if is_empty(old) else [old]
        if calls is None:
            return []
        calls = decoded(calls, f"'tool_calls' of {self._where}")
        if not isinstance(calls, list):
            raise BadRecord("wrong type", f"'tool_calls' of {self._where} must be a list, not {kind_name(calls)}")
        return [self._call(call, f"tool call {number} of {self._where}") for number, call in enumerate(calls, 1)]

    def _calls_in(self, text: str) -> list[dict[str, Any]]:
        what = f"{self._where} is a function call, whose text"
        calls = decoded(text, what)
        return [self._call(call, f"{what} (call {number})") for number, call in enumerate(_as_list(calls), 1)]

    def _call(self, call: Any, what: str) -> dict[str, Any]:
        form = '{"name": ..., "arguments": {...}}'
        if not isinstance(call, dict):
            raise BadRecord("wrong tool call", f"{what} must be {form}, not {kind_name(call)}")
        call = _as_function(self._reading, call, what)
        function = dict(call["function"])
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            # OpenAI's wire format is JSON text; templates and serving engines expect the object.
            function["arguments"] = decoded(arguments, f"'arguments' of {what}") if arguments.strip() else {}
            self._reading.changed.append(ARGUMENTS_DECODED)
        elif arguments is None:
            function["arguments"] = {}
        if not isinstance(function["arguments"], dict):
            found = kind_name(function["arguments"])
            raise BadRecord("wrong tool call", f"'arguments' of {what} must be an object, not {found}")
        return {**call, "function": function}

    def _trained(self, role: Role) -> bool:
        said = {key: self._take(key) for key in _LOSS_KEYS if not is_empty(self._entry.get(key))}
        self._used.update(_LOSS_KEYS)
        for key, value in said.items():
            if isinstance(value, str) or value not in (0, 1):
                known = "0 or 1" if key == "weight" else "true or false"
                raise BadRecord("unknown weight", f"{key!r} of {self._where} is {value!r}; it must be {known}")
        if len({bool(value) for value in said.values()}) > 1:
            both = " and ".join(f"{key} {json.dumps(value)}" for key, value in said.items())
            raise BadRecord("unknown weight", f"{self._where} has {both}, which contradict each other")
        trained = all(said.values())
        if role == "assistant":
            return trained
        if said and trained:
            # Only answers can carry loss here, so the key is counted as ignored.
            self._reading.ignored += [f"{self._field}[].{key} of the {role}" for key in said]
        return True


def _as_function(reading: Reading, value: Mapping[str, Any], what: str) -> dict[str, Any]:
    """{"type": "function", "function": {"name": ...}}, the form of transformers for calls and tools; adds the wrapper
    if it is missing."""
    function = value.get("function")
    if isinstance(function, dict) and isinstance(function.get("name"), str):
        return dict(value) if "type" in value else {"type": "function", **value}
    if isinstance(value.get("name"), str):
        reading.changed.append(CALLS_WRAPPED)
        identity = {"id": value["id"]} if "id" in value else {}
        bare = {key: part for key, part in value.items() if key not in ("id", "type")}
        return {"type": "function", **identity, "function": bare}
    raise BadRecord("wrong tool call", f"{what} has no function name (its fields: {', '.join(value) or 'none'})")


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _are_parts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, dict) and "type" in part for part in value)


def _join_parts(content: object, what: str) -> str:
    """Joins content given as a list of parts, [{"type": "text", "text": ...}]; training supports text only."""
    if not isinstance(content, list) or not content:
        raise BadRecord("wrong type", f"{what} must be text, not {kind_name(content)}")
    texts = []
    for number, part in enumerate(content, start=1):
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            kind = f"of type {part.get('type')!r}" if isinstance(part, dict) else kind_name(part)
            raise BadRecord("wrong type", f"{what} must be text; its part {number} is {kind}")
    return "".join(texts)
