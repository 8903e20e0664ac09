"""The tokenised corpus in flat arrays, which need a few bytes per token and a few dozen per example.

It is built as a stream: every array grows in place, so that 400 million tokens need no second copy.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from flacuna_jax.config.types import Examples
from flacuna_jax.data.tokenization import TokenizedExample, Tokenizer


@dataclass(frozen=True)
class TokenStore:
    """Concatenated examples.

    tokens: uint16 or int32 [total]. loss_mask: bool [total], as in TokenizedExample. offsets: int64 [examples + 1].
    supervised: int32 [examples], number of tokens with loss of each example.
    source_index: int32 [examples], index of the example's source in the config (which has its weight).
    task_index: int32 [examples], index into `tasks`, the values of the records' field `source` ("cot_gsm8k").
    record_index: int64 [examples], number of the record in its source, from 0.
    id_bytes, id_offsets: the records' ids, UTF-8, uint8 [..] and int64 [examples + 1].
    first_lengths: int64 [examples], number of tokens of the first of the two documents of each example; None if
      examples have one document. The two are those of a pair, or an answer and the answer to another question, for KTO.
    good: bool [examples], the labels of single answers; None without labels.
    reference: float32 [examples, 2], log-probability of each document's answer under the reference; None unless it is
      computed before training (run/reference.py).
    """

    tokens: NDArray[np.integer[Any]]
    loss_mask: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    supervised: NDArray[np.int32]
    source_index: NDArray[np.int32]
    task_index: NDArray[np.int32]
    record_index: NDArray[np.int64]
    id_bytes: NDArray[np.uint8]
    id_offsets: NDArray[np.int64]
    sources: tuple[str, ...]
    tasks: tuple[str, ...]
    first_lengths: NDArray[np.int64] | None = None
    good: NDArray[np.bool_] | None = None
    reference: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    @property
    def examples(self) -> Examples:
        """The kind of all examples."""
        return "answers" if self.first_lengths is None else "pairs" if self.good is None else "labelled"

    @property
    def documents(self) -> int:
        """Number of documents of each example."""
        return 1 if self.first_lengths is None else 2

    @functools.cached_property
    def document_lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, [examples, documents]."""
        if self.first_lengths is None:
            return self.lengths[:, None]
        return np.stack([self.first_lengths, self.lengths - self.first_lengths], axis=1)

    def spans(self, example: int) -> tuple[slice, ...]:
        """The tokens of each document of an example."""
        start, end = self.offsets[example], self.offsets[example + 1]
        if self.first_lengths is None:
            return (slice(start, end),)
        middle = start + self.first_lengths[example]
        return slice(start, middle), slice(middle, end)

    def id_of(self, example: int) -> str:
        start, end = self.id_offsets[example], self.id_offsets[example + 1]
        return self.id_bytes[start:end].tobytes().decode()

    def example(self, index: int) -> TokenizedExample:
        span = slice(self.offsets[index], self.offsets[index + 1])
        return TokenizedExample(
            self.tokens[span].astype(np.int32),
            self.loss_mask[span],
            self.id_of(index),
            self.tasks[self.task_index[index]],
            None if self.first_lengths is None else int(self.first_lengths[index]),
            None if self.good is None else bool(self.good[index]),
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hash of everything that training depends on: tokens, masks, lengths and their sources."""
        digest = hashlib.blake2b(digest_size=16)
        of_preferences = (array for array in (self.first_lengths, self.good) if array is not None)
        for array in (self.tokens, self.loss_mask, self.offsets, self.source_index, *of_preferences):
            digest.update(f"{array.dtype.str}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


class _Growing:
    """A flat array that doubles in place when it is full."""

    def __init__(self, dtype: DTypeLike) -> None:
        self._data = np.zeros(1024, dtype)
        self.size = 0

    def append(self, values: NDArray[Any]) -> None:
        end = self.size + len(values)
        if end > len(self._data):
            # realloc moves pages of large arrays and copies nothing; no view of the array exists before it is complete.
            self._data.resize(max(end, 2 * len(self._data)), refcheck=False)
        self._data[self.size : end] = values
        self.size = end

    def finish(self) -> NDArray[Any]:
        self._data.resize(self.size, refcheck=False)
        return self._data


class StoreBuilder:
    """Collects examples block by block; `finish` returns the store. Tokens have 16 bits if the vocabulary permits."""

    def __init__(self, sources: Sequence[str], vocab_size: int) -> None:
        self._sources = tuple(sources)
        self._tokens = _Growing(np.uint16 if vocab_size <= 1 << 16 else np.int32)
        self._loss_mask = _Growing(np.bool_)
        self._lengths = _Growing(np.int64)
        self._supervised = _Growing(np.int32)
        self._source_index = _Growing(np.int32)
        self._task_index = _Growing(np.int32)
        self._record_index = _Growing(np.int64)
        self._id_bytes = _Growing(np.uint8)
        self._id_lengths = _Growing(np.int64)
        self._first_lengths = _Growing(np.int64)
        self._good = _Growing(np.bool_)
        self._tasks: dict[str, int] = {}

    def add(self, source: int, examples: Sequence[TokenizedExample], records: Sequence[int]) -> None:
        """Appends examples of one source; `records` are their record numbers. Raises ValueError for an example without
        loss."""
        if not examples:
            return
        supervised = np.array([np.count_nonzero(example.loss_mask) for example in examples])
        masks = [document.loss_mask for example in examples for document in example.documents]
        if not all(mask.any() for mask in masks) or any(mask[0] for mask in masks):
            raise ValueError("an example has no supervised token, or loss on its first token")
        self._tokens.append(np.concatenate([example.ids for example in examples]))
        self._loss_mask.append(np.concatenate([example.loss_mask for example in examples]))
        self._lengths.append(np.array([len(example.ids) for example in examples]))
        self._supervised.append(supervised)
        self._source_index.append(np.full(len(examples), source))
        self._task_index.append(
            np.array([self._tasks.setdefault(example.source, len(self._tasks)) for example in examples])
        )
        self._record_index.append(np.array(records))
        self._first_lengths.append(np.array([e.first_length for e in examples if e.first_length is not None], np.int64))
        self._good.append(np.array([example.good for example in examples if example.good is not None], np.bool_))
        encoded = [example.id.encode() for example in examples]
        self._id_bytes.append(np.frombuffer(b"".join(encoded), np.uint8))
        self._id_lengths.append(np.array([len(text) for text in encoded]))

    def finish(self) -> TokenStore:
        return TokenStore(
            tokens=self._tokens.finish(),
            loss_mask=self._loss_mask.finish(),
            offsets=_offsets(self._lengths.finish()),
            supervised=self._supervised.finish(),
            source_index=self._source_index.finish(),
            task_index=self._task_index.finish(),
            record_index=self._record_index.finish(),
            id_bytes=self._id_bytes.finish(),
            id_offsets=_offsets(self._id_lengths.finish()),
            sources=self._sources,
            tasks=tuple(self._tasks),
            first_lengths=self._first_lengths.finish() if self._first_lengths.size else None,
            good=self._good.finish() if self._good.size else None,
        )


def _offsets(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


class Piece(NamedTuple):
    """A part of an example's text; each special token is a separate piece."""

    text: str
    supervised: bool
    special: bool = False


def describe_example(store: TokenStore, index: int, tokenizer: Tokenizer) -> list[Piece]:
    """The text of an example as the model sees it, split at special tokens and at the start and end of loss."""
    documents = store.example(index).documents
    return [piece for document in documents for piece in describe_document(document, tokenizer)]


def describe_document(example: TokenizedExample, tokenizer: Tokenizer) -> list[Piece]:
    """`describe_example` for one document."""
    ids, mask = example.ids.tolist(), example.loss_mask.tolist()
    special = tokenizer.special.spellings
    pieces: list[Piece] = []
    chunk_start = 0  # decode a text from its start, so that the spaces between its pieces are right
    start = 0
    while start < len(ids):
        if ids[start] in special:
            pieces.append(Piece(special[ids[start]], mask[start], special=True))
            start += 1
            chunk_start = start
            continue
        end = start
        while end < len(ids) and ids[end] not in special and mask[end] == mask[start]:
            end += 1
        before = tokenizer.decode(ids[chunk_start:start]) if start > chunk_start else ""
        pieces.append(Piece(tokenizer.decode(ids[chunk_start:end])[len(before) :], mask[start]))
        start = end
    return pieces
