r"""`over_length: truncate_prompt`: makes a conversation fit by shortening questions, never answers.

The middle of a question is replaced by "\n...\n", since instructions are at the start (Alpaca) or at the end (few-shot
FLAN). The longest questions are shortened first: all questions are cut to a common maximum length in tokens, but none
below `SHORTEST_QUESTION`. If that is not enough, whole exchanges (a question and everything up to the next question)
are removed: from the end, or with `train_on: last`, which trains on the last answer only, from the start. A
conversation that still does not fit is dropped.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from flacuna_jax.data.conversation import Conversation, Template, Turn
from flacuna_jax.data.tokenization import (
    SegmentEncoder,
    TokenizedExample,
    Tokenizer,
    TrainOn,
    segments_of,
    tokenize_batch,
)

SHORTEST_QUESTION = 32
"""Number of tokens of a question that are always kept."""
GAP = "\n...\n"
_ATTEMPTS = 4


class Shortened(NamedTuple):
    example: TokenizedExample
    turns_removed: int


@dataclass(frozen=True)
class Shortener:
    template: Template
    tokenizer: Tokenizer
    encoder: SegmentEncoder
    train_on: TrainOn
    max_length: int

    def shorten(self, conversation: Conversation, length: int) -> Shortened | None:
        """An example of at most max_length tokens from a conversation of `length` tokens; None if impossible."""
        turns_before = len(conversation.turns)
        while len(conversation.turns) >= 2:
            example = self._cut_questions(conversation, length)
            if example is not None:
                return Shortened(example, turns_before - len(conversation.turns))
            turns = _without_an_exchange(conversation.turns, first=self.train_on == "last")
            if not turns:
                return None
            conversation = replace(conversation, turns=turns)
            example = self._tokenize(conversation)
            length = len(example.ids)
            if length <= self.max_length:
                return Shortened(example, turns_before - len(turns)) if example.loss_mask.any() else None
        return None

    def _cut_questions(self, conversation: Conversation, length: int) -> TokenizedExample | None:
        questions = {
            index: self.tokenizer.encode(turn.text)
            for index, turn in enumerate(conversation.turns)
            if turn.role == "user" and turn.text
        }
        gap = len(self.tokenizer.encode(GAP)) + 2
        budget = sum(map(len, questions.values())) - (length - self.max_length)
        for _ in range(_ATTEMPTS):
            limit = common_limit([len(ids) for ids in questions.values()], budget, gap)
            if not limit:
                return None
            turns = tuple(
                self._cut(turn, questions[index], limit - gap) if len(questions.get(index, ())) > limit else turn
                for index, turn in enumerate(conversation.turns)
            )
            example = self._tokenize(replace(conversation, turns=turns))
            excess = len(example.ids) - self.max_length
            if excess <= 0:
                return example
            # The shortened text may need one or two tokens more than the pieces it was joined from.
            budget -= excess
        return None

    def _cut(self, turn: Turn, ids: list[int], keep: int) -> Turn:
        head, tail = ids[: (keep + 1) // 2], ids[len(ids) - keep // 2 :]
        # A cut within the bytes of a character leaves replacement characters at the edges.
        start = self.tokenizer.decode(head).rstrip("\ufffd").rstrip()
        end = self.tokenizer.decode(tail).lstrip("\ufffd").lstrip()
        return replace(turn, text=f"{start}{GAP}{end}")

    def _tokenize(self, conversation: Conversation) -> TokenizedExample:
        segments = segments_of(conversation, self.template, self.tokenizer)
        return tokenize_batch([conversation], [segments], self.encoder, self.train_on)[0]


def _without_an_exchange(turns: tuple[Turn, ...], first: bool) -> tuple[Turn, ...]:
    """The turns without their first or last exchange: questions, calls of tools, their results, and answers.

    Turns before the first question are kept, and turns at the end without anything to learn are removed. Returns () if
    no exchange is left.
    """
    starts = [i for i, turn in enumerate(turns) if turn.role == "user" and (i == 0 or turns[i - 1].role != "user")]
    if len(starts) < 2:
        return ()
    if first:
        return turns[: starts[0]] + turns[starts[1] :]
    for start in reversed(starts[1:]):
        if turns[start - 1].says_something:
            return turns[:start]
    return ()


def common_limit(lengths: list[int], budget: int, gap: int) -> int:
    """The largest L with sum(min(n, L)) <= budget, so that cutting every n > L to L fits; 0 if there is none.

    The L tokens of a cut question include the gap, so L must be at least `SHORTEST_QUESTION` + gap.
    """
    remaining = budget
    for index, shortest in enumerate(sorted(lengths)):
        share = remaining // (len(lengths) - index)
        if share < shortest:
            return share if share >= SHORTEST_QUESTION + gap else 0
        remaining -= shortest
    return max(lengths, default=0)
