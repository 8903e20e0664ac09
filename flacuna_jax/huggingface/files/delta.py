"""Weights published as differences to LLaMA (Vicuna v0 and v1.1, StableVicuna): target = fp16(base) + fp16(delta).

The sum is computed tensor by tensor on reading, in half precision as the publishers do, so it is bit for bit the same
as adding the two state dicts in memory.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface import names
from flacuna_jax.huggingface.files.tensors import ALL_ROWS, TensorReader, cast, host_device

HALF = np.dtype(np.float16)


@dataclasses.dataclass(frozen=True)
class DeltaReader:
    """The checkpoint that is the sum of a base and a delta.

    Deltas made with a padding token have more rows in the embedding and the head than the base, whose values count as
    zero there.

    Raises:
      UserError: the two do not have the same tensors, or their shapes cannot be added.
    """

    base: TensorReader
    delta: TensorReader

    def __post_init__(self) -> None:
        ours, theirs = ({name for name in reader if not names.is_ignored(name)} for reader in (self.base, self.delta))
        if ours != theirs:
            raise UserError(
                f"{self.delta.directory} is not a delta to {self.base.directory}: "
                f"only one of them has {names.some(sorted(ours ^ theirs))}"
            )
        for name in sorted(ours):
            base, delta = self.base.shape(name), self.delta.shape(name)
            rows = name in (names.EMBEDDING, names.HEAD) and len(base) == 2
            if base != delta and not (rows and base[1:] == delta[1:] and base[0] < delta[0]):
                raise UserError(
                    f"{self.delta.directory} is not a delta to {self.base.directory}: {name} has shape {list(delta)} "
                    f"in the delta, {list(base)} in the base"
                )

    @property
    def directory(self) -> Path:
        """The directory of the delta, whose config.json and tokenizer are those of the sum."""
        return self.delta.directory

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.delta if not names.is_ignored(name))

    def __contains__(self, name: object) -> bool:
        return name in self.delta

    def shape(self, name: str) -> tuple[int, ...]:
        return self.delta.shape(name)

    def dtype(self, name: str) -> np.dtype:
        return HALF

    def read(self, name: str, rows: slice = ALL_ROWS) -> np.ndarray:
        """Returns the sum, or some rows of it, in memory."""
        start, stop, _ = rows.indices(self.shape(name)[0])
        known = min(stop, self.base.shape(name)[0])
        delta = _half(self.delta.read(name, slice(start, stop)))
        base = _half(self.base.read(name, slice(min(start, known), known)))
        if base.shape != delta.shape:
            padded = np.zeros(delta.shape, HALF)
            padded[: len(base)] = base
            base = padded
        with jax.default_device(host_device()):
            return np.asarray(_add(jnp.asarray(base), jnp.asarray(delta)))


def _half(array: np.ndarray) -> np.ndarray:
    return array if array.dtype == HALF else cast(array, HALF)


@jax.jit
def _add(base: jax.Array, delta: jax.Array) -> jax.Array:
    """Several times as fast as NumPy's half-precision addition, with the same rounding."""
    return base + delta
