"""Answers of the model in training to a few questions, for people to read: before, while and after it learns."""

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
    """Token ids of a prompt with its template, what of it a person is shown, and the answer to compare with."""

    id: str
    ids: tuple[int, ...]
    text: str
    expected: str | None


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Puts the questions to the model of the moment; `ask` gives its answers to all parameters and token ids."""

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
    """The held-out examples with the lowest keys whose question has at most `room` tokens; each question once.

    `frame` is what the template writes before and after a question, which people are not shown.
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
