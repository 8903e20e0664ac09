"""A checkpoint with some tensors changed, as an adapter or a larger vocabulary needs it. Nothing is read before it is
used, and everything else reads it like a checkpoint."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import numpy as np

from flacuna_jax.huggingface import names
from flacuna_jax.huggingface.files.read import CheckpointReader
from flacuna_jax.huggingface.files.tensors import ALL_ROWS, MappedFiles, TensorReader, cast, row_blocks
from flacuna_jax.huggingface.load import names_in
from flacuna_jax.model.llama import LlamaConfig

_FLOAT = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor whose rows are computed when they are read: `rows` maps a slice within the shape to values of
    `dtype`."""

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: Callable[[slice], np.ndarray]

    def read(self, files: MappedFiles, rows: slice = ALL_ROWS) -> np.ndarray:
        del files
        start, stop, _ = rows.indices(self.shape[0])
        return self.rows(slice(start, stop))


Change = Callable[[Tensor], Tensor]
"""What happens to a tensor of the base."""


def stored(reader: TensorReader, name: str) -> Tensor:
    """A tensor of a checkpoint, unchanged."""
    return Tensor(reader.shape(name), reader.dtype(name), lambda rows: reader.read(name, rows))


def replaced_by(values: np.ndarray) -> Change:
    """Other values, which may have more or fewer rows, in the dtype of the base."""

    def change(tensor: Tensor) -> Tensor:
        return Tensor(values.shape, tensor.dtype, lambda rows: cast(values[rows], tensor.dtype))

    return change


def with_rows(ids: tuple[int, ...], values_nd: np.ndarray) -> Change:
    """Other values for some rows."""

    def change(tensor: Tensor) -> Tensor:
        def read(rows: slice) -> np.ndarray:
            changed = np.array(tensor.rows(rows))
            for place, number in enumerate(ids):
                if rows.start <= number < rows.stop:
                    changed[number - rows.start] = cast(values_nd[place], tensor.dtype)
            return changed

        return dataclasses.replace(tensor, rows=read)

    return change


def plus_product(a_rv: np.ndarray, b_dr: np.ndarray, scale: float) -> Change:
    """Table + scale · (B A)ᵀ, added in float32 and rounded once: a low-rank adapter of an embedding."""

    def change(tensor: Tensor) -> Tensor:
        def read(rows: slice) -> np.ndarray:
            total = cast(tensor.rows(rows), _FLOAT) + scale * (a_rv[:, rows].T @ b_dr.T)
            return cast(total, tensor.dtype)

        return dataclasses.replace(tensor, rows=read)

    return change


def grown(vocab_size: int, tokens: int) -> int:
    """Number of rows of a table for `tokens` tokens: `vocab_size` if it is enough. A larger number is divisible by the
    same power of two as `vocab_size`, up to 64, so that the table can be split over as many devices."""
    multiple = math.gcd(vocab_size, 64)
    return vocab_size if tokens <= vocab_size else -(-tokens // multiple) * multiple


def extended_to(size: int) -> Change:
    """More rows, all equal to the mean of the others, computed in float64: the centre around which transformers draws
    new embeddings (`resize_token_embeddings` with `mean_resizing`), with a variance of a billionth of theirs."""

    def change(tensor: Tensor) -> Tensor:
        count = tensor.shape[0]

        @functools.cache
        def mean() -> np.ndarray:
            total = np.zeros(tensor.shape[1:])
            for block in row_blocks(tensor.shape, tensor.dtype.itemsize):
                total += tensor.rows(block).sum(axis=0, dtype=np.float64)
            return cast(cast(total / count, _FLOAT), tensor.dtype)

        def read(rows: slice) -> np.ndarray:
            kept = tensor.rows(slice(min(rows.start, count), min(rows.stop, count)))
            if rows.stop <= count:
                return kept
            added = rows.stop - max(rows.start, count)
            return np.concatenate([kept, np.broadcast_to(mean(), (added, *tensor.shape[1:]))])

        return Tensor((size, *tensor.shape[1:]), tensor.dtype, read)

    return change


@dataclasses.dataclass(frozen=True)
class BaseChanges:
    """Changes of a checkpoint.

    Attributes:
      base: sizes of the checkpoint.
      config: sizes of the result: a larger vocabulary, or a head that is no longer tied to the embedding.
      by_tensor: changes of single tensors, in order, by Hugging Face's names.
    """

    base: LlamaConfig
    config: LlamaConfig
    by_tensor: Mapping[str, tuple[Change, ...]]

    def on(self, reader: TensorReader) -> TensorReader:
        """The changed checkpoint. Raises UserError if the checkpoint is not one of these sizes."""
        tensors = {name: stored(reader, source) for name, source in names_in(reader, self.base).items()}
        if names.HEAD not in tensors and not self.config.tie_word_embeddings:
            tensors[names.HEAD] = tensors[names.EMBEDDING]
        for name, changes in self.by_tensor.items():
            for change in changes:
                tensors[name] = change(tensors[name])
        return CheckpointReader(reader.directory, tensors)


def with_more_rows(base: LlamaConfig, vocab_size: int) -> BaseChanges:
    """Larger tables of embedding and head."""
    tables = (names.EMBEDDING,) if base.tie_word_embeddings else (names.EMBEDDING, names.HEAD)
    config = dataclasses.replace(base, vocab_size=vocab_size)
    return BaseChanges(base, config, {table: (extended_to(vocab_size),) for table in tables})
