"""Answers of the model to a few questions before, during and after training, for users to read."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from flacuna_jax.data.held_out import keys, question
from flacuna_jax.data.store import TokenStore
from flacuna_jax.data.tokenization import Tokenizer
from flacuna_jax.model.parameters import Params


@dataclasses.dataclass(frozen=True)
class Question:
    """Token ids of a prompt with its template, its text without the template, and the expected answer if any."""

    id: str
    ids: tuple[int, ...]
    text: str
    expected: str | None


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Asks the current model the questions; `ask` maps all parameters and prompts as token ids to answers."""

    questions: Sequence[Question]
    ask: Callable[[Params, Sequence[tuple[int, ...]]], list[str]]

    def records(self, step: int, params: Params) -> list[dict[str, Any]]:
        """The lines of samples.jsonl for the answers after `step` updates."""
        answers = self.ask(params, [asked.ids for asked in self.questions]) if self.questions else []
        return [
            {"step": step, "id": asked.id, "question": asked.text, "answer": answer, "expected": asked.expected}
            for asked, answer in zip(self.questions, answers, strict=True)
        ]


def choose_questions(
    store: TokenStore, count: int, room: int, tokenizer: Tokenizer, frame: tuple[str, str]
) -> list[Question]:
    """Questions of at most `room` tokens from the held-out examples with the lowest keys, without duplicates.

    `frame`: the template's text before and after a question, which is removed from the question's text.
    """
    found = keys(store)
    chosen: dict[int, Question] = {}
    for index in np.argsort(found, kind="stable"):
        if len(chosen) == count:
            break
        ids = question(store, int(index))
        if 1 < len(ids) <= room:
            chosen.setdefault(int(found[index]), _question(store, int(index), ids, tokenizer, frame))
    return list(chosen.values())


def _question(store: TokenStore, index: int, ids: Any, tokenizer: Tokenizer, frame: tuple[str, str]) -> Question:
    example = store.example(index)
    rest = example.loss_mask[len(ids) :]
    answer = example.ids[len(ids) :][: len(rest) if rest.all() else int(np.argmin(rest))].tolist()
    return Question(
        store.id_of(index),
        tuple(int(token) for token in ids),
        _unframed(tokenizer.decode([int(token) for token in ids]), *frame),
        tokenizer.decode(answer),
    )


def _unframed(text: str, before: str, after: str) -> str:
    framed = len(text) > len(before) + len(after) and text.startswith(before) and text.endswith(after)
    return text[len(before) : len(text) - len(after)] if framed else text
