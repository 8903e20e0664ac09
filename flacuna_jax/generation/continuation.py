"""Continues prompts in rows that are refilled, each with a cache of its own length: `begin` fills rows, `advance` adds
tokens to all of them. Shape suffixes as in `shared_prefix`, and r rows that begin, m new tokens.

Caches are separate blocks of slots, so that a part can be read in place; for the same reason the layers of a small
model on a CPU are separate arrays (`layers_apart`). XLA copies a slice of a larger array before it multiplies it.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flacuna_jax.generation.decode import Sampling, choose_tokens
from flacuna_jax.generation.shared_prefix import (
    Params,
    Prefix,
    Seen,
    as_keys,
    as_values,
    attend_to,
    forward,
    layer_of,
    prefix_of,
    through_layers,
)
from flacuna_jax.model.llama import Llama
from flacuna_jax.model.parameters import ModelSpec

BLOCKS = 4
"""Maximum number of blocks of a cache; a program is compiled for reading one block, two blocks, and so on."""
SMALLEST_BLOCK = 64
"""Minimum number of slots in a block; smaller ones are not worth a separate product."""
SMALL_STACK = 4 << 30
"""Maximum size of all layers in bytes for which a CPU keeps a second copy with separate layers. Larger models would
need too much memory and compile time."""

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

    @property
    def block_slots(self) -> int:
        return jax.tree.leaves(self.blocks[0].v)[0].shape[-1]

    @property
    def slots(self) -> int:
        return len(self.blocks) * self.block_slots


class Recent(NamedTuple):
    """Keys and values of the `made` tokens added since the start of `advance`, in the layout of the caches."""

    k_lbkmn: jax.Array
    v_lbknm: jax.Array
    made: jax.Array


@functools.partial(jax.jit, static_argnames=("spec",))
def _split(spec: ModelSpec, params: Params) -> list[nnx.State]:
    stacked = nnx.state(spec.merge(params).layers)
    return [jax.tree.map(operator.itemgetter(layer), stacked) for layer in range(spec.config.num_layers)]


def layers_apart(spec: ModelSpec, params: Params) -> list[nnx.State] | None:
    """The parameters of each layer separately if that is faster: for a small model on a CPU; otherwise None."""
    parameters = spec.held | spec.adapters
    size = sum(array.nbytes for path, array in params.items() if parameters[path].stacked)
    return _split(spec, params) if jax.default_backend() == "cpu" and size <= SMALL_STACK else None


def empty_rows(spec: ModelSpec, rows: int, slots: int, apart: bool) -> Rows:
    """Empty rows with at least `slots` slots for tokens. `apart`: whether the layers are separate."""
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
    )


@functools.partial(jax.jit, static_argnames=("spec", "sampling"), donate_argnames=("rows",))
def begin(
    spec: ModelSpec,
    params: Params,
    prefix: Prefix | None,
    rows: Rows,
    into_r: jax.Array,
    tokens_rt: jax.Array,
    length_r: jax.Array,
    seed_r: jax.Array,
    sampling: Sampling,
) -> tuple[Rows, jax.Array]:
    """Writes prompts (without the prefix, padded after `length_r`) into the rows `into_r`, and chooses their first
    tokens.

    Row numbers beyond the number of rows are ignored, so that a partly filled group needs no separate compilation.
    """
    model = spec.merge(params)
    count, length = tokens_rt.shape
    segment_ids_rt = (jnp.arange(length) < length_r[:, None]).astype(jnp.int32)
    positions_rt = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (count, length))
    hidden_rtd, k_lrtkn, v_lrtkn = forward(model, tokens_rt, positions_rt, segment_ids_rt, prefix)
    last_r1d = jnp.take_along_axis(hidden_rtd, (length_r - 1)[:, None, None], axis=1)
    token_r = choose_tokens(model.logits(last_r1d)[:, 0], _keys(seed_r, jnp.zeros_like(length_r)), 0, sampling)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[into_r].set(new.astype(old.dtype), mode="drop")

    return Rows(
        _with_prompts(rows, into_r, as_keys(k_lrtkn), as_values(v_lrtkn)),
        put(rows.length_b, length_r),
        put(rows.token_b, token_r),
        put(rows.made_b, jnp.ones_like(length_r)),
        put(rows.seed_b, seed_r),
    ), token_r


@functools.partial(jax.jit, static_argnames=("spec", "steps", "blocks", "sampling"), donate_argnames=("rows",))
def advance(
    spec: ModelSpec,
    params: Params,
    layers: Sequence[nnx.State] | None,
    prefix: Prefix | None,
    rows: Rows,
    steps: int,
    blocks: int,
    sampling: Sampling,
) -> tuple[Rows, jax.Array]:
    """`steps` more tokens for every row, int32 [b, steps]. Ended rows continue too, but their tokens are meaningless.

    Reads only the first `blocks` of the caches, so no row that has not ended may be longer. `layers` is the result of
    `layers_apart`.
    """
    model = spec.merge(params)

    def step(carry: tuple[jax.Array, Recent], _: None) -> tuple[tuple[jax.Array, Recent], jax.Array]:
        token_b, recent = carry
        keys_b = _keys(rows.seed_b, rows.made_b + recent.made)
        logits_bv, recent = _extend(model, layers, prefix, rows, blocks, token_b, recent)
        token_b = choose_tokens(logits_bv, keys_b, 0, sampling)
        return (token_b, recent), token_b

    nothing = _nothing_recent(model, len(rows.token_b), steps)
    (token_b, recent), token_mb = jax.lax.scan(step, (rows.token_b, nothing), None, length=steps)
    return Rows(
        _with_recent(rows, recent), rows.length_b + steps, token_b, rows.made_b + steps, rows.seed_b
    ), token_mb.T


def _nothing_recent(model: Llama, rows: int, steps: int) -> Recent:
    config = model.config
    outer = (config.num_layers, rows, config.num_kv_heads)
    return Recent(
        jnp.zeros((*outer, steps, config.head_dim), model.dtype),
        jnp.zeros((*outer, config.head_dim, steps), model.dtype),
        jnp.int32(0),
    )


def _extend(
    model: Llama,
    layers: Sequence[nnx.State] | None,
    prefix: Prefix | None,
    rows: Rows,
    blocks: int,
    token_b: jax.Array,
    recent: Recent,
) -> tuple[jax.Array, Recent]:
    """Logits [b, v] after `token_b`, and the recent keys and values including its own."""
    # Positions of the first token in the caches, of the first recent token, and of this token.
    first_b = jnp.zeros_like(rows.length_b) if prefix is None else jnp.broadcast_to(prefix.length, rows.length_b.shape)
    first_recent_b = first_b + rows.length_b
    position_b = first_recent_b + recent.made
    size = rows.block_slots

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: int | jax.Array) -> jax.Array:
        from_b1 = model.config.first_visible(layer, position_b[:, None])

        def visible(position_b: jax.Array, slots: int, end_b: jax.Array) -> jax.Array:
            """Whether each of `slots`, at positions from `position_b` on, is filled and in the window: [b, 1, s]."""
            position_bs = position_b[:, None] + jnp.arange(slots)
            return ((position_bs < end_b[:, None]) & (position_bs >= from_b1))[:, None, :]

        parts = [prefix_of(prefix, layer, from_b1)] if prefix is not None else []
        for index, block in enumerate(rows.blocks[:blocks]):
            visible_bts = visible(first_b + index * size, size, first_recent_b)
            parts.append(Seen(_of_layer(block.k, layer), _of_layer(block.v, layer), visible_bts))
        visible_bts = visible(first_recent_b, recent.k_lbkmn.shape[-2], position_b)
        parts.append(Seen(layer_of(recent.k_lbkmn, layer), layer_of(recent.v_lbknm, layer), visible_bts))
        return attend_to(model.config, q, *parts, Seen(as_keys(k), as_values(v), jnp.array(True)))

    hidden_btd, k_lbtkn, v_lbtkn = through_layers(model, token_b[:, None], position_b[:, None], attend, layers)
    recent = Recent(
        jax.lax.dynamic_update_slice_in_dim(recent.k_lbkmn, as_keys(k_lbtkn), recent.made, 3),
        jax.lax.dynamic_update_slice_in_dim(recent.v_lbknm, as_values(v_lbtkn), recent.made, 4),
        recent.made + 1,
    )
    return model.logits(hidden_btd)[:, 0], recent


def _of_layer(layered: Layered, layer: Any) -> jax.Array:
    return layer_of(layered, layer) if isinstance(layered, jax.Array) else layered[layer]


def _written(write: Callable[[jax.Array, jax.Array], jax.Array], layered: Layered, new_l: jax.Array) -> Layered:
    """Applies `write(cache, new)` to every layer."""
    if isinstance(layered, jax.Array):
        return jax.vmap(write)(layered, new_l)
    return [write(cache, new) for cache, new in zip(layered, new_l, strict=True)]


def _with_prompts(rows: Rows, into_r: jax.Array, k_lrktn: jax.Array, v_lrknt: jax.Array) -> tuple[Block, ...]:
    """The caches after writing keys and values of tokens to the rows `into_r`, from the first slot on."""

    def write(cache: jax.Array, new: jax.Array) -> jax.Array:
        return cache.at[into_r, :, : new.shape[2], : new.shape[3]].set(new.astype(cache.dtype), mode="drop")

    blocks = list(rows.blocks)
    for index, begin in enumerate(range(0, k_lrktn.shape[3], rows.block_slots)):
        part = slice(begin, begin + rows.block_slots)
        k, v = blocks[index]
        blocks[index] = Block(_written(write, k, k_lrktn[..., part, :]), _written(write, v, v_lrknt[..., part]))
    return tuple(blocks)


def _with_recent(rows: Rows, recent: Recent) -> tuple[Block, ...]:
    """The caches after writing recent keys and values. Ended rows may run past their cache, where writes are
    ignored."""
    size = rows.block_slots
    row_b1 = jnp.arange(len(rows.token_b))[:, None]
    slot_bm = rows.length_b[:, None] + jnp.arange(recent.k_lbkmn.shape[-2])
    k_lbmkn, v_lbmkn = jnp.moveaxis(recent.k_lbkmn, 3, 2), jnp.moveaxis(recent.v_lbknm, 4, 2)

    def with_recent(index: int, block: Block) -> Block:
        within_bm = jnp.where(slot_bm // size == index, slot_bm % size, size)
        return Block(
            _written(lambda cache, new: cache.at[row_b1, :, within_bm].set(new, mode="drop"), block.k, k_lbmkn),
            _written(lambda cache, new: cache.at[row_b1, :, :, within_bm].set(new, mode="drop"), block.v, v_lbmkn),
        )

    return tuple(with_recent(index, block) for index, block in enumerate(rows.blocks))


def _keys(seed_b: jax.Array, step_b: jax.Array) -> jax.Array:
    return jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))(seed_b, step_b)
