"""Answers of the model in training to a few questions, for people to read: before, while and after it learns."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flacuna_jax.data.held_out import keys, question
from flacuna_jax.data.store import TokenStore
from flacuna_jax.data.tokenization import Tokenizer
from flacuna_jax.model import decode
from flacuna_jax.model.parameters import ModelSpec

SAMPLES = "samples.jsonl"
BATCH = 8


@dataclasses.dataclass(frozen=True)
class Question:
    """Token ids of a prompt with its template, what of it a person is shown, and the answer to compare with."""

    id: str
    ids: tuple[int, ...]
    text: str
    expected: str | None


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Answers the questions greedily, each in at most `max_new_tokens`."""

    questions: Sequence[Question]
    spec: ModelSpec
    mesh: Mesh
    tokenizer: Tokenizer
    max_new_tokens: int
    stop_strings: Sequence[str] = ()

    def answer(self, params: Mapping[str, jax.Array]) -> list[str]:
        """One answer per question."""
        if not self.questions:
            return []
        with jax.set_mesh(self.mesh):
            answers = decode.generate(
                self.spec,
                params,
                [question.ids for question in self.questions],
                max_new_tokens=self.max_new_tokens,
                stop_ids={self.tokenizer.eos_id},
                batch_size=min(BATCH, len(self.questions)),
            )
        return [self._before_stop(self.tokenizer.decode(ids)) for ids in answers]

    def records(self, step: int, answers: Sequence[str]) -> list[dict[str, Any]]:
        """The lines of samples.jsonl for the answers after `step` updates."""
        return [
            {"step": step, "id": asked.id, "question": asked.text, "answer": answer, "expected": asked.expected}
            for asked, answer in zip(self.questions, answers, strict=True)
        ]

    def _before_stop(self, text: str) -> str:
        return text[: min((at for at in map(text.find, self.stop_strings) if at >= 0), default=len(text))]


def choose_questions(store: TokenStore, count: int, room: int, tokenizer: Tokenizer) -> list[Question]:
    """The held-out examples with the lowest keys whose question has at most `room` tokens; each question once."""
    found = keys(store)
    chosen: dict[int, Question] = {}
    for index in np.argsort(found, kind="stable"):
        if len(chosen) == count:
            break
        ids = question(store, int(index))
        if 1 < len(ids) <= room:
            chosen.setdefault(int(found[index]), _question(store, int(index), ids, tokenizer))
    return list(chosen.values())


def _question(store: TokenStore, index: int, ids: Any, tokenizer: Tokenizer) -> Question:
    example = store.example(index)
    rest = example.loss_mask[len(ids) :]
    answer = example.ids[len(ids) :][: len(rest) if rest.all() else int(np.argmin(rest))].tolist()
    special = {tokenizer.bos_id, tokenizer.eos_id}
    asked = [int(token) for token in ids if int(token) not in special]
    return Question(
        store.id_of(index),
        tuple(int(token) for token in ids),
        tokenizer.decode(asked),
        tokenizer.decode([token for token in answer if token not in special]),
    )
