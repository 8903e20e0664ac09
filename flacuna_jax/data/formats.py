r"""Reads the supported record formats into `Conversation`. docs/reference/data.md lists the formats in a table.

sharegpt, flan_mini   {"conversations": [{"from": "human", "value": str}, ...]}
messages              {"messages": [{"role": "user", "content": str or text parts}, ...]}
alpaca                {"instruction": str, "input": str, "output": str, "history": [[str, str], ...]}
dolly                 {"instruction": str, "context": str, "response" or "completion": str}
prompt_completion     {"prompt": str or messages, "completion": str or messages}
question_answer       {"question", "query", "prompt" or "input"; "answer", "response", "output" or "completion": str}
preference, kto       see preferences.py
text                  {"text": str}: no template, every token carries loss; only if the source sets format: text

Lists of messages are read the same in every field; see `messages.py`. `id` and `source` are kept if a record has them;
`system` (or `system_prompt`) and `tools` are used in any format. Every other non-empty field is counted by its name.
Rules for all formats:

- An answer before any question is dropped, as in FastChat, and counted.
- A leading system message replaces the template's system text; an empty one keeps it. The template decides whether it
  supports later system messages and consecutive turns of one role.
- Turns after the last answer (a question without an answer, an empty answer) are removed and counted.
- A record without any text of the assistant is dropped and counted, because there is nothing to learn in it.
- Pairs of a chosen and a rejected answer that are the same, or of which one is empty, are dropped and counted.
- Records of another kind than the objective trains on, and records with pictures, are rejected.
- Any other record is a bad record: an error with its place, or counted, depending on data.on_bad_record.

Alpaca's instruction and input are stripped of white space at both ends and joined as "{instruction}\n{input}", as the
authors of Flacuna did in their earlier Flan-Alpaca. Stanford's own prompt ("Below is an instruction ...") is a
different template for the same fields; here, the Vicuna template replaces it. An input of "<noinput>", which marks
Stanford's seed tasks, counts as empty.
"""

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from flacuna_jax.config.data import SourceConfig
from flacuna_jax.config.types import Examples
from flacuna_jax.data.conversation import Conversation, Turn
from flacuna_jax.data.dataset_info import FileDescription
from flacuna_jax.data.fields import (
    COLUMNS,
    PARSERS,
    Parser,
    described_columns,
    described_parser,
    detect_format,
    refuse_what_is_not_text,
)
from flacuna_jax.data.files import Place, RawRecord, read_records
from flacuna_jax.data.preferences import EMPTY, IDENTICAL
from flacuna_jax.data.record import BadRecord, Reading, kind_name
from flacuna_jax.data.report import BadRecordPolicy
from flacuna_jax.data.source_files import source_files

__all__ = [
    "COLUMNS",
    "EMPTY",
    "IDENTICAL",
    "LEADING_ANSWER",
    "NO_ANSWER",
    "PARSERS",
    "UNANSWERED",
    "BadRecord",
    "parse_record",
    "read_source",
]

LEADING_ANSWER = "first turn of the assistant removed"
UNANSWERED = "last turn without an answer removed"
NO_ANSWER = "no answer in the record"


def read_source(
    config: SourceConfig, policy: BadRecordPolicy, examples: Examples = "answers"
) -> Iterator[tuple[Place, Conversation]]:
    """The usable conversations of a source, in file order, each with its place.

    Records of another kind than `examples` are bad records.

    The format of a file is that of its first record with a known format, or that given by a dataset_info.json next to
    the file. `policy.report` counts every record that is read and every one that is not yielded. The caller applies
    `max_examples`.
    """
    found = source_files(config.path, config.split)
    policy.report.ignored_files = found.ignored
    policy.report.notes = found.notes
    for path in found.files:
        description = found.descriptions.get(path) if config.format == "auto" else None
        chooser = _Chooser(config.format, description, examples)
        if description is not None:
            policy.report.notes += (f"{path.name} read as {description.name!r} of dataset_info.json",)
        for raw in read_records(path, chooser.columns, policy):
            policy.report.read += 1
            try:
                conversation = parse_record(raw, chooser.parser_for(raw), policy)
                _require(examples, conversation)
            except BadRecord as bad:
                policy.reject(bad.reason, raw.place, bad.detail + chooser.other_format(raw))
            else:
                if conversation is not None:
                    yield raw.place, conversation


_KINDS: Mapping[Examples, tuple[str, str]] = {
    "answers": ("an answer without a preference", "instruction tuning (training.objective: null)"),
    "pairs": ("a pair of a chosen and a rejected answer", "training.objective: {name: dpo}, simpo or orpo"),
    "labelled": ("an answer that is labelled good or bad", "training.objective: {name: kto}"),
}
"""Of each kind of example: what a record has, and what trains on it."""


def _require(examples: Examples, conversation: Conversation | None) -> None:
    """Raises BadRecord for an example of another kind."""
    if conversation is not None and conversation.examples != examples:
        (found, theirs), (needed, _) = _KINDS[conversation.examples], _KINDS[examples]
        raise BadRecord(
            "another kind of example", f"the record has {found}, which is for {theirs}; this run needs {needed}"
        )


class _Chooser:
    """Chooses the format of one file: that of the source, of dataset_info.json, or of the first known record."""

    def __init__(self, name: str, description: FileDescription | None, examples: Examples) -> None:
        self._examples = examples
        self.columns = COLUMNS if description is None else (*COLUMNS, *described_columns(description))
        self._name = None if name == "auto" else name
        self._parser = None if name == "auto" else PARSERS[name]
        if description is not None:
            self._name, self._parser = f"{description.name!r} of dataset_info.json", described_parser(description)
        self._decided_by: Place | None = None

    def parser_for(self, raw: RawRecord) -> Parser:
        if self._parser is None:
            self._name = detect_format(raw.value, raw.unread, self._examples)
            self._parser = PARSERS[self._name]
            self._decided_by = raw.place
        return self._parser

    def other_format(self, raw: RawRecord) -> str:
        """For a record not in the file's format: the format it seems to have, and what decided that of the file."""
        if self._parser is None:
            return ""
        try:
            found = detect_format(raw.value, (), self._examples)
        except BadRecord:
            return ""
        if PARSERS[found] is self._parser:
            return ""
        if self._decided_by is None:
            return f" (its fields are those of format: {found})"
        return (
            f" (its fields are those of format {found}, but {self._decided_by.in_file} set the format of the file to "
            f"{self._name}; put the two formats into separate files)"
        )


def parse_record(raw: RawRecord, parse: Parser, policy: BadRecordPolicy) -> Conversation | None:
    """One record as a conversation; None if it has no answer (counted). Raises BadRecord."""
    place, record = raw.place, raw.value
    if not isinstance(record, dict):
        raise BadRecord("wrong type", f"a record must be an object, not {kind_name(record)}")
    reading = Reading(record, used={"id", "source"})
    system, turns, tools, rejected, good = parse(reading)
    _check_unicode(system, [*turns, *(rejected or ())])
    refuse_what_is_not_text(reading, turns, raw.unread)
    for name in dict.fromkeys([*reading.unused(), *reading.ignored, *raw.unread]):
        policy.report.ignore(name)
    for change in dict.fromkeys(reading.changed):
        policy.report.change(change, place)
    identity, source = _id(record, place), _source(record, place)
    if parse is PARSERS["text"]:
        return _plain_text(identity, source, turns, place, policy)
    if rejected is not None:
        if turns == rejected:
            policy.report.drop(IDENTICAL, place)
            return None
        if not all(any(map(_learns, document)) for document in (turns, rejected)):
            policy.report.drop(EMPTY, place)
            return None
        rejected = _repair(rejected, place, policy)
    turns = _repair(turns, place, policy)
    if not turns or (good is not None and not _learns(turns[-1])):
        policy.report.drop(NO_ANSWER, place)
        return None
    other = None if rejected is None else tuple(rejected)
    return Conversation(identity, source, tuple(turns), system, tools, rejected=other, good=good)


def _plain_text(
    identity: str, source: str, turns: list[Turn], place: Place, policy: BadRecordPolicy
) -> Conversation | None:
    """A plain text, to which no template is applied."""
    if not turns[0].text.strip():
        policy.report.drop(NO_ANSWER, place)
        return None
    return Conversation(identity, source, tuple(turns), raw=True)


def _answers(turn: Turn) -> bool:
    """Whether a turn contains something to learn; white space alone does not count."""
    if turn.role != "assistant":
        return False
    return bool(turn.text.strip()) or (turn.extra is not None and replace(turn, text="").says_something)


def _learns(turn: Turn) -> bool:
    return turn.trained and _answers(turn)


def _repair(turns: list[Turn], place: Place, policy: BadRecordPolicy) -> list[Turn]:
    """Removes leading answers and the turns after the last answer; returns [] if nothing is left to learn."""
    begin = next((index for index, turn in enumerate(turns) if turn.role not in ("assistant", "tool")), len(turns))
    if not any(map(_answers, turns[begin:])):
        return []
    end = len(turns)
    while turns[end - 1].role != "assistant" or not turns[end - 1].says_something:
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
        raise BadRecord("invalid Unicode", f"the text contains half a surrogate pair ({error.reason})") from error


def _id(record: Mapping[str, Any], place: Place) -> str:
    value = record.get("id")
    if value is None or not str(value).isprintable():
        return f"{place.path.name}:{place.number}"
    return str(value)


def _source(record: Mapping[str, Any], place: Place) -> str:
    value = record.get("source")
    if isinstance(value, str) and value and value.isprintable():
        return value
    return _name_of(place.path)


@functools.lru_cache(maxsize=64)
def _name_of(path: Path) -> str:
    """A file's name without its extensions and shard number."""
    return re.sub(r"-\d{5}-of-\d{5}.*", "", path.name.split(".")[0])
