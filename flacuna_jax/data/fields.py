"""The fields and the parser of each record format, and the fields that records of any format may have."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from flacuna_jax.config.types import Examples
from flacuna_jax.data.dataset_info import FileDescription
from flacuna_jax.data.messages import ROLES, read_messages, read_tools, without_loss
from flacuna_jax.data.preferences import CHOSEN, LABELS, REJECTED, Prompt, prompt_of, read_label, read_pair
from flacuna_jax.data.record import BadRecord, Dialogue, Reading, decoded, is_empty, kind_name
from flacuna_jax.data.segments import Role, Turn

Parser = Callable[[Reading], Dialogue]

_MESSAGES = ("conversations", "messages", "conversation")
_QUESTIONS = ("question", "query", "prompt", "input")
_ANSWERS = ("answer", "response", "output", "completion")
_SYSTEM = ("system", "system_prompt")
_TOOLS = ("tools", "functions")
_MEDIA = ("images", "videos", "audios")
_MEDIUM = tuple(name.removesuffix("s") for name in _MEDIA)
_MARKS = tuple(f"<{name}>" for name in _MEDIUM)
"""Placeholders of a picture, a video or a sound in a text."""
_PAIR = (*CHOSEN, *REJECTED)
_PAIR_PROMPTS = ("prompt", "question", "query", "instruction", "input")
_NEEDED: Mapping[Examples, str] = {
    "pairs": "`prompt`, `chosen` and `rejected`",
    "labelled": "`prompt`, `completion` and `label`",
}
"""The usual fields of preferences."""
_NOT_TEXT = frozenset((*_MEDIA, *_MEDIUM, *_PAIR, *LABELS))
"""Fields that, unless empty, mark a record as one of pictures or of preferences."""


def _messages(reading: Reading) -> Dialogue:
    field = reading.first(*_MESSAGES)
    field = field or next((name for name in _MESSAGES if name in reading.record), _MESSAGES[0])
    return Dialogue(*read_messages(reading, field))


def _joined(instruction: str, context: str | None) -> str:
    context = (context or "").strip()
    has_none = not context or context.lower() == "<noinput>"
    return instruction.strip() if has_none else f"{instruction.strip()}\n{context}"


def _single_turn(reading: Reading, question: str, context: str | None, answer: str) -> list[Turn]:
    asked = _joined(reading.text(question), reading.optional_text(context) if context else None)
    return [Turn("user", asked), Turn("assistant", reading.text(answer))]


def _history(reading: Reading, field: str = "history") -> list[Turn]:
    """Earlier turns, [[question, answer], ...], in the form of LLaMA-Factory and ms-swift."""
    pairs = decoded(reading.take(field) or [], repr(field))
    form = f"{field!r} must be a list of pairs [question, answer]"
    if not isinstance(pairs, list):
        raise BadRecord("wrong type", f"{form}, not {kind_name(pairs)}")
    turns = []
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRecord("wrong type", form)
        turns += [Turn("user", pair[0]), Turn("assistant", pair[1])]
    return turns


def _alpaca(reading: Reading) -> Dialogue:
    return Dialogue(None, [*_history(reading), *_single_turn(reading, "instruction", "input", "output")])


def _dolly(reading: Reading) -> Dialogue:
    answer = reading.first("response", "completion") or "response"
    return Dialogue(None, [*_history(reading), *_single_turn(reading, "instruction", "context", answer)])


def _question_answer(reading: Reading) -> Dialogue:
    question = reading.first(*_QUESTIONS) or _QUESTIONS[0]
    answer = reading.first(*_ANSWERS) or _ANSWERS[0]
    turns = [Turn("user", reading.text(question)), Turn("assistant", reading.text(answer))]
    return Dialogue(None, [*_history(reading), *turns])


def _prompt_completion(reading: Reading) -> Dialogue:
    """Only the completion carries loss, even if the prompt is a list of messages that contains answers."""
    system: str | None = None
    if isinstance(reading.record.get("prompt"), list):
        system, turns = read_messages(reading, "prompt")
    else:
        turns = [*_history(reading), Turn("user", reading.text("prompt"))]
    if not isinstance(reading.record.get("completion"), list):
        return Dialogue(system, [*without_loss(turns), Turn("assistant", reading.text("completion"))])
    later_system, completion = read_messages(reading, "completion")
    if later_system is not None:
        completion = [Turn("system", later_system), *completion]
    return Dialogue(system, [*without_loss(turns), *completion])


def _preference(reading: Reading) -> Dialogue:
    """A pair of answers; see data/preferences.py."""
    reading = _in_common_form(reading)
    system, chosen, rejected = read_pair(reading, _prompt_of_pair(reading))
    if reading.record.get("messages") == reading.record.get("chosen"):
        reading.used.add("messages")  # UltraFeedback repeats the chosen conversation
    return Dialogue(system, chosen, read_tools(reading, *_TOOLS), rejected)


def _in_common_form(reading: Reading) -> Reading:
    """The record with messages for the prompt and a field for each answer, whatever program wrote it."""
    record = dict(reading.record)
    if isinstance(record.get("input"), dict):  # OpenAI's {"input": {"messages": [...], "tools": [...]}}
        reading.used.add("input")
        record |= record.pop("input")
    field = reading.first(*_MESSAGES)
    if field is not None and reading.first(*CHOSEN) is None:  # ms-swift's messages end with the chosen answer
        messages = decoded(record[field], repr(field))
        if isinstance(messages, list) and messages:
            record |= {field: messages[:-1], CHOSEN[0]: messages[-1:]}
    return replace(reading, record=record)


def _prompt_of_pair(reading: Reading) -> Prompt | None:
    """The prompt beside the two answers; None if each of them is a whole conversation."""
    whole = all(_is_whole(reading.record.get(reading.first(*names) or "")) for names in (CHOSEN, REJECTED))
    for field in ("prompt",) if whole else ("prompt", *_MESSAGES):
        if isinstance(reading.record.get(field), list):
            return Prompt(*read_messages(reading, field))
    question = next((name for name in _PAIR_PROMPTS if not is_empty(reading.record.get(name))), None)
    if question is None:
        return None
    asked = reading.text(question)
    if question == "instruction":
        asked = _joined(asked, reading.optional_text("input"))
    return Prompt(None, prompt_of(asked) or [*_history(reading), Turn("user", asked)])


def _is_whole(answer: object) -> bool:
    """Whether an answer is a list of messages that begins with its prompt."""
    first = answer[0] if isinstance(answer, list) and answer else None
    role = first.get("role") or first.get("from") if isinstance(first, dict) else None
    return isinstance(role, str) and ROLES.get(role.strip().lower()) != "assistant"


def _kto(reading: Reading) -> Dialogue:
    """A record of another format with a label, which is that of the completion or of the last answer."""
    if (name := _format_of(reading.record)) in (None, "prompt_completion"):
        system, turns, *_ = _prompt_completion(reading)
    else:
        system, turns, *_ = PARSERS[name](reading)
        turns = [*without_loss(turns[:-1]), *turns[-1:]]
    return Dialogue(system, turns, good=read_label(reading))


def _text(reading: Reading) -> Dialogue:
    return Dialogue(None, [Turn("assistant", reading.text("text"))])


def _with_fields_beside(parse: Parser) -> Parser:
    """Extends `parse` with a system text and tools from separate fields."""

    def parse_all(reading: Reading) -> Dialogue:
        found = parse(reading)
        return found._replace(system=_system(reading, found.system), tools=found.tools or read_tools(reading, *_TOOLS))

    return parse_all


def _system(reading: Reading, own: str | None) -> str | None:
    """The system text: `own`, which is the one among the messages, or that of a separate field."""
    field = reading.first(*_SYSTEM)
    beside = reading.optional_text(field) if field is not None else None
    if own and beside and own != beside:
        raise BadRecord("two system texts", f"{field!r} and the first message are two different system texts")
    return own or beside or None


_LIST = _with_fields_beside(_messages)
PARSERS: Mapping[str, Parser] = {
    "flan_mini": _LIST,
    "sharegpt": _LIST,
    "messages": _LIST,
    "alpaca": _with_fields_beside(_alpaca),
    "dolly": _with_fields_beside(_dolly),
    "prompt_completion": _with_fields_beside(_prompt_completion),
    "question_answer": _with_fields_beside(_question_answer),
    "preference": _with_fields_beside(_preference),
    "kto": _with_fields_beside(_kto),
    "text": _text,
}

FORMATS: Sequence[tuple[tuple[str, ...], str]] = (
    (("conversations",), "sharegpt"),
    (("messages",), "messages"),
    (("conversation",), "messages"),
    (("instruction", "output"), "alpaca"),
    (("instruction", "response"), "dolly"),
    (("instruction", "completion"), "dolly"),
    (("prompt", "completion"), "prompt_completion"),
    (("question", "answer"), "question_answer"),
    (("question", "response"), "question_answer"),
    (("question", "completion"), "question_answer"),
    (("query", "answer"), "question_answer"),
    (("query", "response"), "question_answer"),
    (("prompt", "response"), "question_answer"),
    (("input", "output"), "question_answer"),
)
"""Required fields of each format; the first entry whose fields a record has decides its format."""

COLUMNS = tuple(
    dict.fromkeys(
        (
            "id",
            "source",
            *(field for fields, _ in FORMATS for field in fields),
            "context",
            "history",
            "text",
            *_SYSTEM,
            *_TOOLS,
            *_MEDIA,
            *_PAIR,
            *LABELS,
        )
    )
)
"""The fields that any format reads."""


def detect_format(record: object, unread: Sequence[str] = (), examples: Examples = "answers") -> str:
    """The format whose fields a record has.

    Args:
      record: the record.
      unread: more field names.
      examples: the kind that the run needs. In instruction tuning, `label` is often the class of an example, so that
        only true and false beside a completion say that it is good or bad.

    Raises:
      BadRecord: the fields are of no known format.
    """
    if not isinstance(record, dict):
        raise BadRecord("wrong type", f"a record must be an object, not {kind_name(record)}")
    if _has_pair(record):
        return "preference"
    if _has_label(record, examples):
        return "kto"
    if (found := _format_of(record)) is not None:
        return found
    has = [name[:30] for name, value in record.items() if value is not None] + list(unread)
    if examples in _NEEDED:
        detail = f"this run needs {_NEEDED[examples]}; docs/guides/preference.md has other forms"
        raise BadRecord("no known format", f"{detail} (the record's fields: {', '.join(has[:12]) or 'none'})")
    if isinstance(record.get("text"), str):
        detail = "the record has only `text`; set format: text in its source to train on it without a template"
        raise BadRecord("no known format", f"{detail} (its fields: {', '.join(has[:12])})")
    named = {name.strip().lower(): name for name in record}
    for fields, _ in FORMATS:
        if all(field in named for field in fields):
            renamed = ", ".join(f"{named[field]!r} as {field!r}" for field in fields if named[field] != field)
            if renamed:
                raise BadRecord("no known format", f"field names must be lower case: write {renamed}")
    known = "; ".join(" + ".join(fields) for fields, _ in FORMATS[:-1])
    raise BadRecord(
        "no known format",
        f"the record has no known format (its fields: {', '.join(has[:12]) or 'none'}; known are {known}; text). "
        "Rename the fields, or describe them in a dataset_info.json next to the file, as for LLaMA-Factory",
    )


def _has_label(record: Mapping[str, Any], examples: Examples) -> bool:
    if examples == "labelled":
        return any(name in record for name in LABELS)
    completed = isinstance(record.get("label"), bool) and record.get("completion") is not None
    return completed or not is_empty(record.get("kto_tag"))


def _format_of(record: Mapping[str, Any]) -> str | None:
    """The first format of instruction data whose fields a record has."""
    return next((name for fields, name in FORMATS if all(record.get(field) is not None for field in fields)), None)


def refuse_what_is_not_text(reading: Reading, turns: Sequence[Turn], unread: Sequence[str]) -> None:
    """Raises BadRecord for pictures, and for preferences that the format of the file would ignore."""
    if not unread and reading.record.keys().isdisjoint(_NOT_TEXT):
        return
    if _has_pair(reading.record) and reading.used.isdisjoint(_PAIR):
        raise _of_preferences("chosen and rejected answers", "preference")
    if "kto_tag" in reading.record and "kto_tag" not in reading.used:
        raise _of_preferences("kto_tag, which says whether the answer is good", "kto")
    if isinstance(reading.record.get("label"), bool) and "completion" in reading.used and "label" not in reading.used:
        raise _of_preferences("label, which says whether the completion is good", "kto")
    marked = any(mark in turn.text for turn in turns for mark in _MARKS)
    for name in (*reading.record, *unread):
        filled = name in unread or not is_empty(reading.record[name])
        if filled and (name in _MEDIA or (marked and name in _MEDIUM)):
            raise BadRecord("pictures or sound", f"the record has {name!r}; training supports text only")


def _has_pair(record: Mapping[str, Any]) -> bool:
    return any(not is_empty(record.get(name)) for name in _PAIR)


def _of_preferences(what: str, name: str) -> BadRecord:
    return BadRecord(
        "preference data",
        f"the record has {what}, which this format does not read; set format: {name} in its source, and "
        "training.objective for preference tuning",
    )


def described_columns(description: FileDescription) -> tuple[str, ...]:
    return tuple(description.columns.values())


def described_parser(description: FileDescription) -> Parser:
    """The parser of a file that LLaMA-Factory's dataset_info.json describes."""
    if description.ranking or "kto_tag" in description.columns:
        return partial(_described_preference, description)
    return partial(_described_sharegpt if description.formatting == "sharegpt" else _described_alpaca, description)


def _described_alpaca(description: FileDescription, reading: Reading) -> Dialogue:
    columns = _usable_columns(description, reading)
    if "prompt" not in columns or "response" not in columns:
        raise BadRecord("no known format", f"{description.name!r} of dataset_info.json must name prompt and response")
    history = _history(reading, columns["history"]) if "history" in columns else []
    query = columns.get("query")
    turns = [*history, *_single_turn(reading, columns["prompt"], query, columns["response"])]
    return _described(columns, reading, None, turns)


def _described_preference(description: FileDescription, reading: Reading) -> Dialogue:
    """A ranking, or an answer with a label: the record under the names of our own format."""
    columns = _usable_columns(description, reading)
    renamed = {ours: reading.record.get(theirs) for ours, theirs in columns.items()}
    for ours, name in (("messages", "conversations"), ("response", "completion"), ("query", "input")):
        if ours in renamed:
            renamed[name] = renamed.pop(ours)
    if "prompt" in renamed and isinstance(renamed["prompt"], str):
        renamed["prompt"] = _joined(renamed["prompt"], renamed.pop("input", None))
    reading.used.update(columns.values())
    inner = Reading(renamed, set(), reading.ignored, reading.changed)
    return PARSERS["preference" if description.ranking else "kto"](inner)


def _described_sharegpt(description: FileDescription, reading: Reading) -> Dialogue:
    columns = _usable_columns(description, reading)
    tags = description.tags
    roles: dict[str, Role] = {
        tags["user_tag"].lower(): "user",
        tags["assistant_tag"].lower(): "assistant",
        tags["observation_tag"].lower(): "tool",
        tags["function_tag"].lower(): "assistant",
        tags["system_tag"].lower(): "system",
    }
    system, turns = read_messages(
        reading,
        columns.get("messages", "conversations"),
        {**ROLES, **roles},
        frozenset({tags["function_tag"].lower()}),
        (tags["role_tag"], tags["content_tag"]),
    )
    return _described(columns, reading, system, turns)


def _usable_columns(description: FileDescription, reading: Reading) -> Mapping[str, str]:
    for name in ("chosen", "rejected"):
        column = description.columns.get(name)
        if not description.ranking and column is not None and not is_empty(reading.record.get(column)):
            raise BadRecord(
                "preference data",
                f"the record has {name} answers in {column!r}; set ranking: true in {description.name!r} of "
                "dataset_info.json for preference tuning",
            )
    for name in _MEDIA:
        if name in description.columns and not is_empty(reading.record.get(description.columns[name])):
            raise BadRecord("pictures or sound", f"the record has {name}; training supports text only")
    return description.columns


def _described(columns: Mapping[str, str], reading: Reading, own: str | None, turns: list[Turn]) -> Dialogue:
    beside = reading.optional_text(columns["system"]) if "system" in columns else None
    tools = read_tools(reading, columns["tools"]) if "tools" in columns else ()
    return Dialogue(own or beside or None, turns, tools)
