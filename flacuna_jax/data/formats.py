r"""Readers for the record formats people have, all ending in `Conversation`.

flan_mini, sharegpt   {"conversations": [{"from": "human"|"gpt"|"system", "value": str}, ...]}
messages              {"messages": [{"role": "user"|"assistant"|"system", "content": str or text parts}, ...]}
alpaca                {"instruction": str, "input": str (may be absent or empty), "output": str}
prompt_completion     {"prompt": str, "completion": str}

`id` and `source` are kept where a record has them. Rules for all formats:

- Turns must alternate; a first turn of the assistant is dropped, as FastChat did, and counted.
- A system message may stand first and replaces the template's system text; an empty one keeps the template's.
- A last turn of the user's without an answer (or with an empty one) is removed and counted; what was answered stays.
- A record in which the assistant says nothing is dropped and counted: there is nothing to learn in it.
- Anything else is a bad record: an error with its place, or counted, as data.on_bad_record says.

Alpaca's instruction and input are joined as "{instruction}\n{input}", each stripped of white space at its ends, the way
the authors of Flacuna did in their earlier Flan-Alpaca. Stanford's own prompt ("Below is an instruction ...") is
another template for the same fields; a Vicuna template takes its place. An input of "<noinput>", the mark of Stanford's
seed tasks, counts as none.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from flacuna_jax.config import SourceConfig
from flacuna_jax.data.conversation import Conversation, Role, Turn
from flacuna_jax.data.files import Place, RawRecord, find_files, read_records
from flacuna_jax.data.report import BadRecordPolicy

COLUMNS = (
    "id",
    "source",
    "conversations",
    "messages",
    "instruction",
    "input",
    "output",
    "prompt",
    "completion",
)
"""The fields that any format reads."""

_CHAT_ROLES: Mapping[str, Role | None] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "system": None,
}
_MESSAGE_ROLES: Mapping[str, Role | None] = {"user": "user", "assistant": "assistant", "system": None}

LEADING_ANSWER = "first turn of the assistant removed"
UNANSWERED = "last turn without an answer removed"
NO_ANSWER = "no answer in the record"


class BadRecord(Exception):
    """A record that cannot be understood: a `reason` to count it under, and what exactly is wrong."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


Dialogue = tuple[str | None, list[Turn]]
"""System text and turns, as the record has them."""


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise BadRecord("wrong type", f"{key!r} must be text, not {_kind(value)}")
    return value


def _kind(value: object) -> str:
    names = {type(None): "null", dict: "an object", list: "a list", bool: "true or false", int: "a number", str: "text"}
    return names.get(type(value), type(value).__name__)


def _dialogue(
    record: Mapping[str, Any], field: str, role_key: str, text_key: str, roles: Mapping[str, Role | None]
) -> Dialogue:
    entries = record.get(field)
    if not isinstance(entries, list):
        raise BadRecord("wrong type", f"{field!r} must be a list of turns, not {_kind(entries)}")
    system: str | None = None
    turns: list[Turn] = []
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise BadRecord("wrong type", f"turn {index + 1} must be an object, not {_kind(entry)}")
        name = entry.get(role_key)
        if not isinstance(name, str) or name not in roles:
            known = ", ".join(sorted(roles))
            raise BadRecord("unknown role", f"turn {index + 1} has the unknown {role_key} {name!r} (known: {known})")
        text = entry.get(text_key)
        if not isinstance(text, str):
            text = _join_parts(text, f"{text_key!r} of turn {index + 1}")
        role = roles[name]
        if role is not None:
            turns.append(Turn(role, text))
        elif index == 0:
            system = text or None
        else:
            raise BadRecord("system message after the start", f"turn {index + 1} is a system message, not the first")
    return system, turns


def _join_parts(content: object, what: str) -> str:
    """Content given as a list of parts, [{"type": "text", "text": ...}]; only text can be trained on."""
    if isinstance(content, list) and content:
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) == len(content) and all(isinstance(text, str) for text in texts):
            return "".join(str(text) for text in texts)
    raise BadRecord("wrong type", f"{what} must be text, not {_kind(content)}")


def _sharegpt(record: Mapping[str, Any]) -> Dialogue:
    return _dialogue(record, "conversations", "from", "value", _CHAT_ROLES)


def _messages(record: Mapping[str, Any]) -> Dialogue:
    return _dialogue(record, "messages", "role", "content", _MESSAGE_ROLES)


def _alpaca(record: Mapping[str, Any]) -> Dialogue:
    question = _text(record, "instruction").strip()
    if record.get("input") is not None:
        context = _text(record, "input").strip()
        if context and context.lower() != "<noinput>":
            question = f"{question}\n{context}"
    return None, [Turn("user", question), Turn("assistant", _text(record, "output"))]


def _prompt_completion(record: Mapping[str, Any]) -> Dialogue:
    return None, [Turn("user", _text(record, "prompt")), Turn("assistant", _text(record, "completion"))]


Parser = Callable[[Mapping[str, Any]], Dialogue]
PARSERS: Mapping[str, Parser] = {
    "flan_mini": _sharegpt,
    "sharegpt": _sharegpt,
    "messages": _messages,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
}
_REQUIRED = {
    "sharegpt": ("conversations",),
    "messages": ("messages",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
}


def detect_format(record: object) -> str:
    """The format whose fields a record has; raises BadRecord naming what it has instead."""
    if not isinstance(record, dict):
        raise BadRecord("wrong type", f"a record must be an object, not {_kind(record)}")
    for name, fields in _REQUIRED.items():
        if all(record.get(field) is not None for field in fields):
            return name
    known = "; ".join(f"{name}: {' + '.join(fields)}" for name, fields in _REQUIRED.items())
    has = ", ".join(list(record)[:8]) or "none"
    raise BadRecord("no known format", f"the record is of no known format (its fields: {has}; known are {known})")


def read_source(config: SourceConfig, policy: BadRecordPolicy) -> Iterator[tuple[Place, Conversation]]:
    """The usable conversations of a source, in file order, each with its place.

    The format of a file is that of its first record that has a known one. Every record read is counted in
    `policy.report`, and so is every one that is not passed on; `max_examples` is the caller's to apply.
    """
    found = find_files(Path(config.path))
    policy.report.ignored_files = found.ignored
    for path in found.files:
        parse = None if config.format == "auto" else PARSERS[config.format]
        for raw in read_records(path, COLUMNS, policy):
            policy.report.read += 1
            try:
                if parse is None:
                    parse = PARSERS[detect_format(raw.value)]
                conversation = parse_record(raw, parse, policy)
            except BadRecord as bad:
                policy.reject(bad.reason, raw.place, bad.detail + _other_format(raw.value, config.format))
            else:
                if conversation is not None:
                    yield raw.place, conversation


def _other_format(record: object, name: str) -> str:
    """Of a record that is not in the format of that name: in which it seems to be."""
    try:
        found = detect_format(record)
    except BadRecord:
        return ""
    return "" if name == "auto" or PARSERS[found] is PARSERS[name] else f" (its fields are those of format: {found})"


def parse_record(raw: RawRecord, parse: Parser, policy: BadRecordPolicy) -> Conversation | None:
    """One record as a conversation; None if it has no answer (counted). Raises BadRecord."""
    place, record = raw
    if not isinstance(record, dict):
        raise BadRecord("wrong type", f"a record must be an object, not {_kind(record)}")
    system, turns = parse(record)
    _check_unicode(system, turns)
    for first, second in pairwise(turns):
        if first.role == second.role:
            raise BadRecord("turns do not alternate", f"two turns of the {first.role} follow each other")
    turns = _repair(turns, place, policy)
    if not turns:
        policy.report.drop(NO_ANSWER, place)
        return None
    return Conversation(_id(record, place), _source(record, place), tuple(turns), system)


def _repair(turns: list[Turn], place: Place, policy: BadRecordPolicy) -> list[Turn]:
    """Without an answer that comes first and questions that come last; [] if nothing is left to learn."""
    begin = 1 if turns and turns[0].role == "assistant" else 0
    if not any(turn.role == "assistant" and turn.text.strip() for turn in turns[begin:]):
        return []
    end = len(turns)
    while turns[end - 1].role == "user" or not turns[end - 1].text:
        end -= 1
    if begin:
        policy.report.change(LEADING_ANSWER, place)
    if end < len(turns):
        policy.report.change(UNANSWERED, place)
    return turns[begin:end]


def _check_unicode(system: str | None, turns: list[Turn]) -> None:
    try:
        for turn in turns:
            turn.text.encode()
        (system or "").encode()
    except UnicodeEncodeError as error:
        raise BadRecord("invalid Unicode", f"the text holds half a surrogate pair ({error.reason})") from error


def _id(record: Mapping[str, Any], place: Place) -> str:
    value = record.get("id")
    if value is None or not str(value).isprintable():
        return f"{place.path.name}:{place.number}"
    return str(value)


def _source(record: Mapping[str, Any], place: Place) -> str:
    value = record.get("source")
    return value if isinstance(value, str) and value and value.isprintable() else place.path.name.split(".")[0]
