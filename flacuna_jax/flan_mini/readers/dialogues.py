"""Conversations: Alpaca-style records, ShareGPT exports, and a released FLAN-mini itself."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flacuna_jax.data.conversation import Conversation
from flacuna_jax.data.files import Place, RawRecord, read_records
from flacuna_jax.data.formats import COLUMNS, PARSERS, BadRecord, parse_record
from flacuna_jax.data.report import BadRecordPolicy, SourceReport
from flacuna_jax.flan_mini.config import MixtureSource
from flacuna_jax.flan_mini.items import DIALOGUE, READY, Item
from flacuna_jax.flan_mini.readers.common import (
    Items,
    Reader,
    Unusable,
    attempt,
    each,
    filled,
    find_all,
    optional,
    text_of,
)
from flacuna_jax.flan_mini.sharegpt import CleaningError, clean

_NO_INPUT = {"", "<noinput>", "noinput", "n/a", "none"}
"""The placeholders for an empty input in Alpaca-style records."""


def _read_alpaca(source: MixtureSource, path: Path, policy: BadRecordPolicy) -> Items:
    def convert(_: Place, record: Mapping[str, Any]) -> Iterator[Item]:
        instruction = filled(text_of(record, "instruction"), "instruction")
        text = (optional(record, "input") or "").strip()
        answer = filled(text_of(record, "output"), "output")
        if text.lower() in _NO_INPUT:
            yield Item(source.name, "instruction", {"instruction": instruction, "answer": answer})
        else:
            fields = {"instruction": instruction, "input": text, "answer": answer}
            yield Item(source.name, "instruction_with_input", fields)

    return each(path, ("instruction", "input", "output"), policy, convert)


def _read_sharegpt(source: MixtureSource, path: Path, policy: BadRecordPolicy) -> Items:
    for raw in read_records(path, ("id", "conversations", "items"), policy):
        for place, record in _exported(raw):
            policy.report.read += 1
            for item in attempt(policy, place, partial(_cleaned, source.name, record, place, policy)):
                yield place, item


def _cleaned(task: str, record: Any, place: Place, policy: BadRecordPolicy) -> list[Item]:
    try:
        conversation, changes = clean(record)
    except CleaningError as reason:
        # Records that cleaning removes are counted and are never an error.
        raise Unusable(reason.reason, reason.detail) from None
    for change in changes:
        policy.report.change(change, place)
    return [_dialogue(task, conversation, ready_id=False)]


def _exported(raw: RawRecord) -> Iterator[tuple[Place, Any]]:
    """The conversations of a record: itself, or those of an object {name: {"log": [...]}} (DialogStudio's layout)."""
    value = raw.value
    is_table = isinstance(value, dict) and value and all(isinstance(v, dict) and "log" in v for v in value.values())
    if not is_table:
        yield raw.place, value
        return
    for number, (name, dialogue) in enumerate(value.items(), start=1):
        turns: list[dict[str, Any]] = []
        for turn in dialogue["log"] if isinstance(dialogue["log"], list) else []:
            if isinstance(turn, dict):
                turns.append({"from": "human", "value": turn.get("user utterance")})
                turns.append({"from": "gpt", "value": turn.get("system response")})
        identity = dialogue.get("original dialog id") or name
        yield raw.place._replace(number=number), {"id": identity, "conversations": turns}


def _dialogue(task: str, conversation: Conversation, ready_id: bool) -> Item:
    turns = [[turn.role, turn.text] for turn in conversation.turns]
    fields: dict[str, Any] = {"id": conversation.id, "turns": turns}
    if conversation.system is not None:
        fields["system"] = conversation.system
    if ready_id:
        return Item(task, READY, fields)
    first_answer = conversation.turns[1].text
    # As in FastChat: conversations with the same id, or with the same first answer and number of turns, are the same.
    same_as = (f"id {conversation.id}", f"answer {len(turns)} {first_answer}")
    return Item(task, DIALOGUE, fields, same_as=same_as, size=len(turns))


def _read_flan_mini(_: MixtureSource, path: Path, policy: BadRecordPolicy) -> Items:
    for raw in read_records(path, COLUMNS, policy):
        policy.report.read += 1
        for item in attempt(policy, raw.place, partial(_released, raw, policy)):
            yield raw.place, item


def _released(raw: RawRecord, policy: BadRecordPolicy) -> list[Item]:
    # parse_record counts removed records itself; here `attempt` does.
    seen = SourceReport("")
    conversation = parse_record(raw, PARSERS["flan_mini"], BadRecordPolicy(seen, "error"))
    if conversation is None:
        raise Unusable(next(iter(seen.dropped)), "")
    for change in seen.changed:
        policy.report.change(change, raw.place)
    for number, turn in enumerate(conversation.turns):
        if turn.role != ("user", "assistant")[number % 2]:
            raise BadRecord("turns do not alternate", f"turn {number + 1} is the {turn.role}'s")
    if conversation.id != str(raw.value.get("id")):
        # This id depends on the place in the file; later it is replaced by one that depends on the content.
        conversation = replace(conversation, id="")
    return [_dialogue(conversation.source, conversation, ready_id=True)]


ALPACA = Reader(find_all, _read_alpaca)
SHAREGPT = Reader(find_all, _read_sharegpt)
FLAN_MINI = Reader(find_all, _read_flan_mini)
