"""Caches of keys and values of rows, each with its own length. Shape suffixes as in `shared_prefix`, and r rows that
begin, m new tokens.

Caches are separate blocks of slots, so that a part can be read in place; for the same reason the layers of a small
model on a CPU are separate arrays. XLA copies a slice of a larger array before it multiplies it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flacuna_jax.generation.decode import RowSampling
from flacuna_jax.generation.settings import GREEDY
from flacuna_jax.generation.shared_prefix import layer_of
from flacuna_jax.model.parameters import ModelSpec

BLOCKS = 4
"""Maximum number of blocks of a cache; a program is compiled for reading one block, two blocks, and so on."""
SMALLEST_BLOCK = 64
"""Minimum number of slots in a block; smaller ones are not worth a separate product."""
Layered = jax.Array | Sequence[jax.Array]
"""A stack [l, ...], or separate layers."""


class Block(NamedTuple):
    """Keys [l, b, k, s, n] and values [l, b, k, n, s] in the slots of one part of the caches."""

    k: Layered
    v: Layered


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
    def block_slots(self) -> int:
        return jax.tree.leaves(self.blocks[0].v)[0].shape[-1]

    @property
    def slots(self) -> int:
        return len(self.blocks) * self.block_slots


def empty_rows(spec: ModelSpec, rows: int, slots: int, apart: bool, own_columns: bool = False) -> Rows:
    """Empty rows with at least `slots` slots for tokens.

    Args:
      apart: whether the layers are separate.
      own_columns: whether each row has an adapter of its own.
    """
    config = spec.config
    block_slots = max(SMALLEST_BLOCK, -(-slots // BLOCKS))
    shape = (rows, config.num_kv_heads, block_slots, config.head_dim)

    def empty(shape: tuple[int, ...]) -> Layered:
        if apart:
            return [jnp.zeros(shape, spec.dtype) for _ in range(config.num_layers)]
        return jnp.zeros((config.num_layers, *shape), spec.dtype)

    return Rows(
        tuple(Block(empty(shape), empty((*shape[:2], *reversed(shape[2:])))) for _ in range(-(-slots // block_slots))),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros(rows, jnp.uint32),
        jax.tree.map(jnp.asarray, RowSampling.of([GREEDY] * rows)),
        jnp.zeros((rows, 2), jnp.int32) if own_columns else None,
    )


def of_layer(layered: Layered, layer: Any) -> jax.Array:
    return layer_of(layered, layer) if isinstance(layered, jax.Array) else layered[layer]


def _written(write: Callable[[jax.Array, jax.Array], jax.Array], layered: Layered, new_l: jax.Array) -> Layered:
    """Applies `write(cache, new)` to every layer."""
    if isinstance(layered, jax.Array):
        return jax.vmap(write)(layered, new_l)
    return [write(cache, new) for cache, new in zip(layered, new_l, strict=True)]


def written_at(
    rows: Rows, row_r1: jax.Array, slot_rm: jax.Array, k_lrmkn: jax.Array, v_lrmkn: jax.Array
) -> tuple[Block, ...]:
    """The caches after writing keys and values to slots of rows; what is outside of the caches is ignored."""
    size = rows.block_slots

    def write(index: int, block: Block) -> Block:
        within_rm = jnp.where(slot_rm // size == index, slot_rm % size, size)

        def keys(cache: jax.Array, new: jax.Array) -> jax.Array:
            return cache.at[row_r1, :, within_rm].set(new.astype(cache.dtype), mode="drop")

        def values(cache: jax.Array, new: jax.Array) -> jax.Array:
            return cache.at[row_r1, :, :, within_rm].set(new.astype(cache.dtype), mode="drop")

        return Block(_written(keys, block.k, k_lrmkn), _written(values, block.v, v_lrmkn))

    return tuple(write(index, block) for index, block in enumerate(rows.blocks))
