"""Training data of the step benchmarks: shapes, documents drawn with a seed, and the same documents packed or padded.

Token ids are random, lengths are not: they follow the two corpora named in `CORPORA`.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

IGNORED = -100
"""torch's label of a target without loss."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int = 32000

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def matrix_parameters(self) -> int:
        """Weights that multiply every token: projections and head, without the embedding."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.intermediate) + self.vocab * self.hidden


SHAPES = {
    "tiny": Shape(64, 176, 2, 4, 512),
    "58m": Shape(512, 1376, 8, 8),
    "7b": Shape(4096, 11008, 32, 32),
    "13b": Shape(5120, 13824, 40, 40),
}

TARGETS = {
    "q,v": ("q_proj", "v_proj"),
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}


@dataclass(frozen=True)
class Corpus:
    """Documents of a template, a prompt and an answer with loss; lengths in tokens, both log-normal."""

    template: int
    prompt_median: float
    prompt_sigma: float
    answer_median: float
    answer_sigma: float
    longest: int

    def document(self, rng: np.random.Generator, vocab: int) -> "Document":
        prompt = self.template + rng.lognormal(np.log(self.prompt_median), self.prompt_sigma)
        answer = max(1.0, rng.lognormal(np.log(self.answer_median), self.answer_sigma))
        scale = min(1.0, self.longest / (prompt + answer))
        prompt, answer = max(1, int(prompt * scale)), max(1, int(answer * scale))
        return Document(rng.integers(3, vocab, prompt + answer).astype(np.int32), prompt)


CORPORA = {
    # Fitted to the 2,015 records of Code-Alpaca's 2k file in the Vicuna template: 133 tokens, 68 of them supervised.
    "code-alpaca": Corpus(40, 21, 0.55, 45, 0.99, 686),
    # Few-shot FLAN, longer prompts and short answers: about 230 tokens, 50 of them supervised. Assumed, not measured.
    "flan": Corpus(40, 100, 0.8, 25, 1.2, 1280),
    "tiny": Corpus(4, 6, 0.5, 6, 0.8, 48),
}


@dataclass(frozen=True)
class Document:
    tokens: np.ndarray
    prompt: int
    """Tokens before the first supervised one."""

    @property
    def supervised(self) -> int:
        return len(self.tokens) - self.prompt


@dataclass(frozen=True)
class Rows:
    """Packed or padded rows, int32 [rows, length] each; `labels` are the row's tokens, or IGNORED without loss."""

    tokens: np.ndarray
    labels: np.ndarray
    segments: np.ndarray
    positions: np.ndarray

    @property
    def live(self) -> int:
        return int((self.segments > 0).sum())

    @property
    def supervised(self) -> int:
        return int((self.labels != IGNORED).sum())

    @property
    def documents(self) -> int:
        return int(self.segments.max(axis=1).sum())

    def step_batch(self, micro_batch: int) -> dict[str, np.ndarray]:
        """The batch for the step: leaves [accumulation, micro_batch, length], with targets shifted to the left by
        one."""
        targets = np.zeros_like(self.tokens)
        targets[:, :-1] = self.tokens[:, 1:]
        loss_mask = np.zeros(self.tokens.shape, bool)
        loss_mask[:, :-1] = self.labels[:, 1:] != IGNORED
        leaves = {
            "tokens": self.tokens,
            "targets": targets,
            "segment_ids": self.segments,
            "positions": self.positions,
            "loss_mask": loss_mask,
        }
        return {name: leaf.reshape(-1, micro_batch, leaf.shape[1]) for name, leaf in leaves.items()}


def documents(corpus: Corpus, vocab: int, seed: int) -> Iterator[Document]:
    rng = np.random.default_rng(seed)
    while True:
        yield corpus.document(rng, vocab)


def packed_documents(corpus: Corpus, vocab: int, rows: int, length: int, seed: int) -> list[list[Document]]:
    """The documents of `rows` packed rows: drawn one after another, each placed in the fullest row with enough
    space."""
    members: list[list[Document]] = [[] for _ in range(rows)]
    room = [length] * rows
    misses = 0
    for document in documents(corpus, vocab, seed):
        fitting = [row for row in range(rows) if room[row] >= len(document.tokens)]
        if fitting:
            row = min(fitting, key=lambda row: room[row])
            members[row].append(document)
            room[row] -= len(document.tokens)
        misses += not fitting
        if misses > 20:
            break
    return members


def lay(members: Sequence[Sequence[Document]], length: int) -> Rows:
    """One row of `length` per member with its documents in sequence; positions restart at each document and at
    padding."""
    shape = (len(members), length)
    tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    labels = np.full(shape, IGNORED, np.int32)
    for row, of_row in enumerate(members):
        start = 0
        for number, document in enumerate(of_row, 1):
            stop = start + len(document.tokens)
            tokens[row, start:stop] = document.tokens
            labels[row, start + document.prompt : stop] = document.tokens[document.prompt :]
            segments[row, start:stop] = number
            positions[row, start:stop] = np.arange(stop - start)
            start = stop
        positions[row, start:] = np.arange(length - start)
    return Rows(tokens, labels, segments, positions)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of both sides of the step benchmark."""
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--targets", choices=TARGETS, default="q,v")
    parser.add_argument("--corpus", choices=CORPORA, required=True)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--length", type=int, default=1280)
    parser.add_argument("--rows", type=int, default=8, help="packed rows per optimizer step")
    parser.add_argument("--batches", type=int, default=2, help="number of packings, used in turn")
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of measurement per variant or mode")
