"""Converts items to finished records: worded, measured in tokens, and short enough, or else counted by reason."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from flacuna_jax.data.conversation import Conversation, Template, Turn
from flacuna_jax.data.tokenization import SegmentEncoder, TokenizedExample, Tokenizer, segments_of, tokenize_batch
from flacuna_jax.flan_mini.few_shot import Draft, Pool, Writer
from flacuna_jax.flan_mini.items import DIALOGUE, READY, Item
from flacuna_jax.flan_mini.sharegpt import split

BLOCK = 256
"""Number of records that are tokenised together."""

FEW_SHOT, WITH_OPTIONS = 1, 2
"""Bits of `Record.traits`."""

TOO_LONG = "longer than max_length"
PAIR_TOO_LONG = "question-answer pair longer than max_length"
NO_ANSWER_TOKENS = "no token of an answer"
FEWER_EXEMPLARS = "exemplars left out to fit max_length"
NO_EXEMPLAR_FITS = "no exemplar fits: shown without"

_NAMES = {"user": "human", "assistant": "gpt"}


@dataclass(frozen=True)
class Record:
    """`text` is the record's JSON; lengths are in tokens, including the template."""

    text: str
    content: str
    """The content of a record that identifies duplicates: the turns, without id and source."""
    length: int
    supervised: int
    traits: int


@dataclass(frozen=True)
class Outcome:
    """The result of a candidate: its records, losses and changes."""

    key: int
    records: tuple[Record, ...] = ()
    lost: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Open:
    """A candidate in progress: its draft and the remaining exemplars."""

    key: int
    item: Item
    draft: Draft
    chosen: tuple[int, ...]

    def conversation(self, identity: str) -> Conversation:
        turns = (Turn("user", self.draft.prompt(self.chosen)), Turn("assistant", self.draft.target))
        return Conversation(identity, self.item.task, turns)


@dataclass(frozen=True)
class RecordMaker:
    """Makes the records of one source. `encoder` is the tokenizer's."""

    source: str
    writer: Writer
    template: Template
    tokenizer: Tokenizer
    encoder: SegmentEncoder
    max_length: int

    def make(self, candidates: Sequence[tuple[int, Item]], pool: Pool) -> list[Outcome]:
        """The outcomes of candidates of one task, in their order."""
        outcomes: list[Outcome] = []
        for start in range(0, len(candidates), BLOCK):
            block = candidates[start : start + BLOCK]
            dialogues = {key: self._dialogue(key, item) for key, item in block if _is_dialogue(item)}
            worded = self._worded([(key, item) for key, item in block if not _is_dialogue(item)], pool)
            done = dialogues | {outcome.key: outcome for outcome in worded}
            outcomes += [done[key] for key, _ in block]
        return outcomes

    def _worded(self, block: Sequence[tuple[int, Item]], pool: Pool) -> list[Outcome]:
        waiting = []
        for key, item in block:
            draft = self.writer.draft(key, item, pool)
            waiting.append(_Open(key, item, draft, self._fitting(draft)))
        outcomes: list[Outcome] = []
        while waiting:
            examples = self._tokenize([open_.conversation(self._identity(open_.key)) for open_ in waiting])
            again: list[_Open] = []
            for open_, example in zip(waiting, examples, strict=True):
                if len(example.ids) > self.max_length and open_.chosen:
                    again.append(_Open(open_.key, open_.item, open_.draft, open_.chosen[:-1]))
                else:
                    outcomes.append(self._finish(open_, example))
            waiting = again
        return outcomes

    def _fitting(self, draft: Draft) -> tuple[int, ...]:
        """The exemplars, in order, that fit into max_length with the query; exact up to a few tokens at the joints."""
        every = tuple(range(len(draft.exemplars)))
        # A token has at least one byte, so a text with few bytes needs no counting.
        if not every or len((draft.everything + draft.target).encode()) + self._overhead <= self.max_length:
            return every
        texts = [draft.head + draft.query, draft.target, *draft.exemplars]
        counts = [len(self.tokenizer.encode(text)) for text in texts]
        separator = len(self.tokenizer.encode(draft.separator))
        left = self.max_length - self._overhead - counts[0] - counts[1]
        chosen = []
        for index, count in enumerate(counts[2:]):
            if count + separator <= left:
                chosen.append(index)
                left -= count + separator
        return tuple(chosen)

    @cached_property
    def _overhead(self) -> int:
        turns = (Turn("user", "a"), Turn("assistant", "a"))
        return len(self._tokenize([Conversation("", "", turns)])[0].ids)

    def _finish(self, open_: _Open, example: TokenizedExample) -> Outcome:
        outcome = Outcome(open_.key, changed=_changes(open_))
        if len(example.ids) > self.max_length:
            return Outcome(open_.key, lost=Counter([TOO_LONG]))
        if not example.loss_mask.any():
            return Outcome(open_.key, lost=Counter([NO_ANSWER_TOKENS]))
        is_few_shot = bool(open_.chosen) or open_.item.type.startswith("fs_")
        has_options = open_.draft.with_options or open_.item.type.endswith("_opt")
        traits = FEW_SHOT * is_few_shot | WITH_OPTIONS * has_options
        record = _record(open_.conversation(self._identity(open_.key)), example, traits)
        return Outcome(open_.key, (record,), changed=outcome.changed)

    def _dialogue(self, key: int, item: Item) -> Outcome:
        turns = tuple(Turn(role, text) for role, text in item.fields["turns"])
        identity = item.fields["id"] or f"{self.source}_{key:016x}"
        conversation = Conversation(identity, item.task, turns, item.fields.get("system"))
        if item.family == READY:
            example = self._tokenize([conversation])[0]
            if len(example.ids) > self.max_length:
                return Outcome(key, lost=Counter([TOO_LONG]))
            return Outcome(key, (_record(conversation, example, 0),))

        def count(turns: Sequence[Turn]) -> int:
            return len(self._tokenize([Conversation("", "", tuple(turns), conversation.system)])[0].ids)

        parts, lost = split(conversation, self.max_length, count)
        examples = self._tokenize(parts)
        records = tuple(_record(part, example, 0) for part, example in zip(parts, examples, strict=True))
        return Outcome(key, records, lost=Counter({PAIR_TOO_LONG: lost}) if lost else Counter())

    def _identity(self, key: int) -> str:
        return f"identity_{self.source}_{key:016x}"

    def _tokenize(self, conversations: Sequence[Conversation]) -> list[TokenizedExample]:
        segments = [segments_of(conversation, self.template, self.encoder.tokenizer) for conversation in conversations]
        return tokenize_batch(conversations, segments, self.encoder, "assistant")


def _is_dialogue(item: Item) -> bool:
    return item.family == DIALOGUE or "turns" in item.fields


def _changes(open_: _Open) -> Counter[str]:
    if len(open_.chosen) == len(open_.draft.exemplars):
        return Counter()
    return Counter([FEWER_EXEMPLARS if open_.chosen else NO_EXEMPLAR_FITS])


def _record(conversation: Conversation, example: TokenizedExample, traits: int) -> Record:
    turns: list[dict[str, Any]] = [{"from": _NAMES[turn.role], "value": turn.text} for turn in conversation.turns]
    if conversation.system is not None:
        turns.insert(0, {"from": "system", "value": conversation.system})
    record = {"id": conversation.id, "source": conversation.source, "conversations": turns}
    content = json.dumps(turns, ensure_ascii=False)
    return Record(
        json.dumps(record, ensure_ascii=False), content, len(example.ids), int(example.loss_mask.sum()), traits
    )
