"""Caches of keys and values of rows, each with its own length. Shape suffixes as in `shared_prefix`, and r rows that
begin, m new tokens.

Caches are separate blocks of slots, so that a part can be read in place; for the same reason the layers of a small
model on a CPU are separate arrays. XLA copies a slice of a larger array before it multiplies it.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flacuna_jax.generation.decode import RowSampling
from flacuna_jax.generation.settings import GREEDY
from flacuna_jax.generation.sizes import coarse_size
from flacuna_jax.model.parameters import ModelSpec

FIRST_BLOCK = 256
"""Slots of the first block; smaller ones are not worth a separate product."""
Layered = jax.Array | Sequence[jax.Array]
"""A stack [l, ...], or separate layers."""


class Block(NamedTuple):
    """Keys [l, b, k, s, n] and values [l, b, k, n, s] in the slots of one part of the caches."""

    k: Layered
    v: Layered

    @property
    def slots(self) -> int:
        return jax.tree.leaves(self.v)[0].shape[-1]


class Rows(NamedTuple):
    """Prompts that are being continued; the cache of row b has `length_b` tokens, and `token_b` is the next one."""

    blocks: tuple[Block, ...]
    length_b: jax.Array
    token_b: jax.Array
    made_b: jax.Array
    """Number of new tokens so far, including `token_b`: the step that is folded into sampling keys."""
    seed_b: jax.Array
    sampling: RowSampling
    columns_b2: jax.Array | None
    """The columns of each row's adapter (`lora.select_columns`); None if all rows use the whole adapter."""

    @property
    def row_axis(self) -> int:
        """The axis of the rows in the arrays of the blocks, which have the layers first if they are stacked."""
        return 1 if isinstance(self.blocks[0].k, jax.Array) else 0

    @property
    def firsts(self) -> list[int]:
        """The first slot of each block, and the end of the last one."""
        return first_slots(self.blocks)

    @property
    def slots(self) -> int:
        return self.firsts[-1]

    def blocks_for(self, length: int) -> int:
        """Number of blocks that have the first `length` slots, or all of them."""
        return sum(first < length for first in self.firsts[:-1])


def first_slots(blocks: Sequence[Block]) -> list[int]:
    """The first slot of each block, and the end of the last one."""
    return list(itertools.accumulate((block.slots for block in blocks), initial=0))


def block_sizes(slots: int) -> list[int]:
    """Slots of each block. Each is as large as all before it together, so that a program, which is compiled for a
    number of blocks, reads at most twice the slots that it needs."""
    sizes = [min(FIRST_BLOCK, slots)]
    while (total := sum(sizes)) < slots:
        sizes.append(min(total, slots - total))
    return sizes


def slots_for(length: int) -> int:
    """The number of slots for rows of at most `length` tokens."""
    return max(FIRST_BLOCK, coarse_size(length))


def empty_rows(spec: ModelSpec, rows: int, slots: int, apart: bool, own_columns: bool = False) -> Rows:
    """Empty rows with `slots` slots for tokens.

    Args:
      apart: whether the layers are separate.
      own_columns: whether each row has an adapter of its own.
    """
    config = spec.config

    def empty(*shape: int) -> Layered:
        if apart:
            return [jnp.zeros(shape, spec.dtype) for _ in range(config.num_layers)]
        return jnp.zeros((config.num_layers, *shape), spec.dtype)

    outer, size = (rows, config.num_kv_heads), config.head_dim
    return Rows(
        tuple(Block(empty(*outer, slots, size), empty(*outer, size, slots)) for slots in block_sizes(slots)),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(rows, jnp.uint32),
        jax.tree.map(jnp.asarray, RowSampling.of([GREEDY] * rows)),
        jnp.zeros((rows, 2), jnp.int32) if own_columns else None,
    )


def first_rows(rows: Rows, count: int, blocks: int) -> Rows:
    """The first `count` rows, with their first `blocks` blocks."""

    def cut(axis: int) -> Callable[[jax.Array], jax.Array]:
        return lambda x: jax.lax.slice_in_dim(x, 0, count, axis=axis)

    caches = jax.tree.map(cut(rows.row_axis), rows.blocks[:blocks])
    return Rows(caches, *jax.tree.map(cut(0), rows[1:]))


def copy_row(rows: Rows, source: jax.Array, target: jax.Array, blocks: int) -> Rows:
    """Copies all numbers and the first `blocks` blocks of a row to another row."""

    def copied(axis: int) -> Callable[[jax.Array], jax.Array]:
        def copy(x: jax.Array) -> jax.Array:
            row = jax.lax.dynamic_index_in_dim(x, source, axis)
            return jax.lax.dynamic_update_index_in_dim(x, row, target, axis)

        return copy

    caches = jax.tree.map(copied(rows.row_axis), rows.blocks[:blocks])
    return Rows((*caches, *rows.blocks[blocks:]), *jax.tree.map(copied(0), rows[1:]))


def _written(write: Callable[[jax.Array, jax.Array], jax.Array], layered: Layered, new_l: jax.Array) -> Layered:
    """Applies `write(cache, new)` to every layer."""
    if isinstance(layered, jax.Array):
        return jax.vmap(write)(layered, new_l)
    return [write(cache, new) for cache, new in zip(layered, new_l, strict=True)]


def written_at(
    blocks: Sequence[Block], row_r1: jax.Array, slot_rm: jax.Array, k_lrmkn: jax.Array, v_lrmkn: jax.Array
) -> tuple[Block, ...]:
    """The caches after writing keys and values to slots of rows; what is outside of the caches is ignored."""

    def write(first: int, block: Block) -> Block:
        outside = block.slots
        within_rm = jnp.where((slot_rm >= first) & (slot_rm < first + outside), slot_rm - first, outside)

        def keys(cache: jax.Array, new: jax.Array) -> jax.Array:
            return cache.at[row_r1, :, within_rm].set(new.astype(cache.dtype), mode="drop")

        def values(cache: jax.Array, new: jax.Array) -> jax.Array:
            return cache.at[row_r1, :, :, within_rm].set(new.astype(cache.dtype), mode="drop")

        return Block(_written(keys, block.k, k_lrmkn), _written(values, block.v, v_lrmkn))

    return tuple(write(first, block) for first, block in zip(first_slots(blocks), blocks, strict=False))
