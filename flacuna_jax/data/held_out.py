"""Held-out records for evaluation, selected by their question, not by their position.

The key of an example is a hash of its tokens before the first that carries loss: template, system text and question.
Therefore records with the same question are either all held out or all trained on, even if their answers differ, and
adding, removing or reordering other records changes nothing. If no text precedes the loss (plain text), the key is a
hash of the whole example.
"""

import dataclasses
import hashlib
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flacuna_jax.config.run import EvaluationConfig
from flacuna_jax.data.store import TokenStore
from flacuna_jax.errors import UserError


class Split(NamedTuple):
    """`training` is the whole store, but with source -1 for held-out examples, so that no epoch draws them. `held_out`
    contains only those examples."""

    training: TokenStore
    held_out: TokenStore


def keys(store: TokenStore) -> NDArray[np.uint64]:
    """uint64 [examples], equal for examples with the same question; independent of seed and position."""
    return np.array([_key(store, index) for index in range(len(store))], np.uint64)


def hold_out(store: TokenStore, evaluation: EvaluationConfig | None) -> tuple[TokenStore, TokenStore | None]:
    """What is trained on, and what `evaluation.fraction` holds out of it; None where it holds out nothing.

    Raises:
      UserError: as `split` does.
    """
    if evaluation is None or evaluation.fraction is None:
        return store, None
    return split(store, evaluation.fraction, evaluation.max_examples)


def split(store: TokenStore, fraction: float, max_examples: int | None = None) -> Split:
    """Holds out the examples whose key is in the lowest `fraction` of the key range. At most `max_examples` of them are
    evaluated; the others are not trained on either.

    Raises:
      UserError: no example or every example would be held out.
    """
    found = keys(store)
    chosen = found < np.uint64(fraction * 2.0**64)
    if not chosen.any() or chosen.all():
        count, total = int(chosen.sum()), len(store)
        raise UserError(
            f"evaluation.fraction {fraction:g} holds out {count} of {total} examples; "
            f"{'use a larger fraction' if not count else 'use a smaller fraction'}, or set evaluation.sources"
        )
    source_index = np.where(chosen, np.int32(-1), store.source_index)
    measured = lowest(found, np.flatnonzero(chosen), max_examples)
    return Split(dataclasses.replace(store, source_index=source_index), select(store, measured))


def lowest(found: NDArray[np.uint64], examples: NDArray[np.int64], max_examples: int | None) -> NDArray[np.int64]:
    """The `max_examples` examples with the lowest keys, in the order of the store; all if None."""
    if max_examples is None or len(examples) <= max_examples:
        return examples
    return np.sort(examples[np.argsort(found[examples], kind="stable")[:max_examples]])


def select(store: TokenStore, examples: NDArray[np.int64]) -> TokenStore:
    """A store of the given examples, in that order; their arrays are copied."""
    return dataclasses.replace(
        store,
        tokens=_pieces(store.tokens, store.offsets, examples),
        loss_mask=_pieces(store.loss_mask, store.offsets, examples),
        offsets=_offsets(store.offsets, examples),
        supervised=store.supervised[examples],
        source_index=store.source_index[examples],
        task_index=store.task_index[examples],
        record_index=store.record_index[examples],
        id_bytes=_pieces(store.id_bytes, store.id_offsets, examples),
        id_offsets=_offsets(store.id_offsets, examples),
        first_lengths=None if store.first_lengths is None else store.first_lengths[examples],
        good=None if store.good is None else store.good[examples],
        reference=None if store.reference is None else store.reference[examples],
    )


def question(store: TokenStore, index: int) -> NDArray[np.int32]:
    """The token ids of an example before the first one that carries loss."""
    example = store.example(index)
    return example.ids[: int(np.argmax(example.loss_mask))]


def _key(store: TokenStore, index: int) -> int:
    start, end = int(store.offsets[index]), int(store.offsets[index + 1])
    asked = int(np.argmax(store.loss_mask[start:end]))
    # A single token is BOS, which would give every example the same key.
    tokens = store.tokens[start : start + asked if asked > 1 else end]
    return int.from_bytes(hashlib.blake2b(tokens.astype("<i4").tobytes(), digest_size=8).digest(), "little")


def _pieces(flat: NDArray[Any], offsets: NDArray[np.int64], examples: NDArray[np.int64]) -> NDArray[Any]:
    return np.concatenate([flat[:0], *(flat[offsets[index] : offsets[index + 1]] for index in examples)])


def _offsets(offsets: NDArray[np.int64], examples: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(np.diff(offsets)[examples])]).astype(np.int64)
