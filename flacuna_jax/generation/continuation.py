"""Continues prompts in rows that are refilled, each with a cache of its own length: `fill` writes several prompts, or a
part of one, into the caches of their rows, `start` chooses their first tokens, `advance` adds tokens to all rows. Shape
suffixes as in `shared_prefix`, and r rows of tokens or rows that begin, j parts of prompts, m new tokens,
a alternatives.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flacuna_jax.generation import caches
from flacuna_jax.generation.caches import Block, Layered, Rows, first_rows, written_at
from flacuna_jax.generation.decode import LogProbabilities, Numbers, RowSampling, choose_tokens, log_probabilities
from flacuna_jax.generation.shared_prefix import (
    SCORED_TOGETHER,
    Earlier,
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
from flacuna_jax.model.llama import Llama, LlamaConfig
from flacuna_jax.model.lora import select_columns
from flacuna_jax.model.parameters import ModelSpec


class Packed(NamedTuple):
    """Parts of prompts (without the prefix), one after the other in rows of tokens, one for each device that computes
    rows of its own. Numbers of rows beyond the batch are ignored: those of padding, and of missing parts, so that fewer
    parts need no separate compilation."""

    tokens_rt: jax.Array
    part_rt: jax.Array
    """The number of each token's part, from 1 on; 0 for padding."""
    row_rt: jax.Array
    """The row of the batch of each token."""
    slot_rt: jax.Array
    """Its slot in the cache of that row."""
    target_rt: jax.Array
    """The token that follows, for its log-probability."""
    last_j: jax.Array
    """The index of the last token of each part, in the rows of tokens one after the other."""
    row_j: jax.Array
    """The row of the batch of each part."""
    columns_2: jax.Array | None = None
    """The columns of the adapter of all parts, as in `Rows`."""


class Chosen(NamedTuple):
    """Chosen tokens and, if alternatives were asked for, their log-probabilities."""

    token: jax.Array
    log_probabilities: LogProbabilities | None


class Recent(NamedTuple):
    """Keys and values of the tokens added since the start of `advance`, in the layout of the caches; with [l, ...] in
    front for all layers together."""

    k_bkmn: jax.Array
    v_bknm: jax.Array

    @classmethod
    def nothing(cls, spec: ModelSpec, rows: int, steps: int, *layers: int) -> "Recent":
        outer, size = (*layers, rows, spec.config.num_kv_heads), spec.config.head_dim
        return cls(jnp.zeros((*outer, steps, size), spec.dtype), jnp.zeros((*outer, size, steps), spec.dtype))

    def with_new(self, k_b1kn: jax.Array, v_b1kn: jax.Array, made: Numbers) -> "Recent":
        """With the keys and values of one more token of each row, after `made` others."""

        def put(recent: jax.Array, new: jax.Array, axis: int) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(recent, new, made, recent.ndim + axis)

        return Recent(put(self.k_bkmn, as_keys(k_b1kn), -2), put(self.v_bknm, as_values(v_b1kn), -1))


@functools.partial(jax.jit, static_argnames=("spec", "blocks", "alternatives"), donate_argnames=("rows",))
def fill(
    spec: ModelSpec,
    params: Params,
    prefix: Prefix | None,
    rows: Rows,
    packed: Packed,
    scored: Numbers | bool = False,
    blocks: int = 0,
    alternatives: int = 0,
) -> tuple[Rows, jax.Array, LogProbabilities | None]:
    """Writes parts of prompts into the caches.

    Args:
      scored: whether the targets are scored; otherwise, their log-probabilities are zeros.
      blocks: number of blocks of the caches that have earlier tokens of the prompt, if there is only one part; 0 if
        every part begins its prompt.
      alternatives: number of alternatives to the targets; 0 scores nothing.

    Returns:
      The rows, the logits after each part [j, v], and log-probabilities of the targets [r * t].
    """
    columns_12 = None if packed.columns_2 is None else packed.columns_2[None]
    columns_r2 = None if columns_12 is None else jnp.broadcast_to(columns_12, (len(packed.tokens_rt), 2))
    model = spec.merge(params)
    positions_rt = packed.slot_rt if prefix is None else packed.slot_rt + prefix.length
    earlier = _earlier(model, prefix, rows, packed, positions_rt, blocks)
    hidden_rtd, k_lrtkn, v_lrtkn = forward(model, packed.tokens_rt, positions_rt, packed.part_rt, earlier, columns_r2)
    written = written_at(rows.blocks, packed.row_rt, packed.slot_rt, k_lrtkn, v_lrtkn)
    length_j = packed.slot_rt.reshape(-1)[packed.last_j] + 1
    filled = rows._replace(blocks=written, length_b=_put(rows.length_b, packed.row_j, length_j))
    if rows.columns_b2 is not None and columns_12 is not None:
        columns_j2 = jnp.broadcast_to(columns_12, (len(packed.row_j), 2))
        filled = filled._replace(columns_b2=_put(rows.columns_b2, packed.row_j, columns_j2))
    model = for_rows(model, columns_12)
    hidden_1md = hidden_rtd.reshape(1, -1, hidden_rtd.shape[-1])
    scores = _scores_if(scored, alternatives, lambda: _scores(model, hidden_1md, packed.target_rt, alternatives))
    return filled, model.logits(hidden_1md[:, packed.last_j])[0], scores


@functools.partial(jax.jit, static_argnames=("alternatives",), donate_argnames=("rows",))
def start(
    rows: Rows,
    into_r: jax.Array,
    logits_rv: jax.Array,
    seed_r: jax.Array,
    sampling: RowSampling,
    method: Numbers | int,
    scored: Numbers | bool = False,
    alternatives: int = 0,
) -> tuple[Rows, Chosen]:
    """Chooses the first new tokens of the rows `into_r` from logits after their prompts, and keeps their settings.

    `method` is that of `choose_tokens`, `scored` and `alternatives` are those of `advance`.
    """
    token_r = choose_tokens(logits_rv, _keys(seed_r, jnp.zeros_like(into_r)), sampling, method)
    rows = rows._replace(
        token_b=_put(rows.token_b, into_r, token_r),
        made_b=_put(rows.made_b, into_r, jnp.ones_like(token_r)),
        seed_b=_put(rows.seed_b, into_r, seed_r),
        sampling=RowSampling(*(_put(old, into_r, new) for old, new in zip(rows.sampling, sampling, strict=True))),
    )
    return rows, Chosen(
        token_r, _scores_if(scored, alternatives, lambda: log_probabilities(logits_rv, token_r, alternatives))
    )


keep_rows = functools.partial(jax.jit, static_argnames=("count", "blocks"))(first_rows)
copy_row = functools.partial(jax.jit, static_argnames=("blocks",), donate_argnames=("rows",))(caches.copy_row)


@functools.partial(
    jax.jit, static_argnames=("spec", "steps", "count", "blocks", "alternatives"), donate_argnames=("rows",)
)
def advance(
    spec: ModelSpec,
    params: Params,
    prefix: Prefix | None,
    rows: Rows,
    method: Numbers | int,
    scored: Numbers | bool = False,
    *,
    steps: int,
    count: int,
    blocks: int,
    alternatives: int = 0,
) -> tuple[Rows, Chosen]:
    """`steps` more tokens for each of the first `count` rows, [count, steps]. Ended rows continue too, but their tokens
    are meaningless. `by_layer.advance` does the same for rows whose layers are separate.

    Args:
      method: that of `choose_tokens`.
      scored: whether the tokens are scored; otherwise, their log-probabilities are zeros.
      blocks: number of blocks of the caches that are read; no row that has not ended may be longer.
      alternatives: number of alternatives to the tokens; 0 scores nothing.
    """
    used = first_rows(rows, count, blocks)
    model = for_rows(spec.merge(params), used.columns_b2)

    def step(carry: tuple[jax.Array, Recent], made: jax.Array) -> tuple[tuple[jax.Array, Recent], Chosen]:
        token_b, recent = carry

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: int | jax.Array) -> jax.Array:
            blocks, own = jax.tree.map(lambda stacked: layer_of(stacked, layer), (used.blocks, recent))
            return attend_in_rows(model.config, layer, prefix, blocks, used.length_b, own, made, q, k, v)

        positions_b1 = positions(prefix, used.length_b, made)[:, None]
        hidden_b1d, k_lb1kn, v_lb1kn = through_layers(model, token_b[:, None], positions_b1, attend, used.columns_b2)
        chosen = choose(model.logits(hidden_b1d)[:, 0], used, made, method, scored, alternatives)
        return (chosen.token, recent.with_new(k_lb1kn, v_lb1kn, made)), chosen

    nothing = Recent.nothing(spec, count, steps, spec.config.num_layers)
    (_, recent), chosen = jax.lax.scan(step, (used.token_b, nothing), jnp.arange(steps))
    chosen = jax.tree.map(lambda values: jnp.swapaxes(values, 0, 1), chosen)
    written = with_recent(rows.blocks, used.length_b, recent)
    return advanced(rows, chosen.token)._replace(blocks=written), chosen


def positions(prefix: Prefix | None, length_b: jax.Array, made: Numbers | int) -> jax.Array:
    """The position of the next token of each row, after `made` tokens that are not in the caches."""
    return length_b + made if prefix is None else prefix.length + length_b + made


def choose(
    logits_bv: jax.Array,
    rows: Rows,
    made: Numbers,
    method: Numbers | int,
    scored: Numbers | bool,
    alternatives: int,
) -> Chosen:
    """The next token of each row, after `made` others of this `advance`."""
    token_b = choose_tokens(logits_bv, _keys(rows.seed_b, rows.made_b + made), rows.sampling, method)
    scores = _scores_if(scored, alternatives, lambda: log_probabilities(logits_bv, token_b, alternatives))
    return Chosen(token_b, scores)


def advanced(rows: Rows, token_bm: jax.Array) -> Rows:
    """The numbers of the rows after adding new tokens to the first of them."""
    count, steps = token_bm.shape
    return rows._replace(
        length_b=rows.length_b.at[:count].add(steps),
        token_b=rows.token_b.at[:count].set(token_bm[:, -1]),
        made_b=rows.made_b.at[:count].add(steps),
    )


def _scores_if(
    scored: Numbers | bool, alternatives: int, scores: Callable[[], LogProbabilities]
) -> LogProbabilities | None:
    """`scores()` if `scored`, otherwise zeros. None if the program has no alternatives."""
    if not alternatives:
        return None
    shapes = jax.eval_shape(scores)
    return jax.lax.cond(scored, scores, lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))


def _put(old_b: Numbers, into_r: Numbers, new_r: Numbers) -> jax.Array:
    return jnp.asarray(old_b).at[into_r].set(new_r.astype(old_b.dtype), mode="drop")


def for_rows(model: Llama, columns_b2: jax.Array | None) -> Llama:
    """The network whose head uses the columns of each row's adapter; its layers do so in `through_layers`."""
    if columns_b2 is not None and not model.config.tie_word_embeddings:
        nnx.update(model.lm_head, select_columns(nnx.state(model.lm_head), columns_b2))
    return model


def _earlier(
    model: Llama, prefix: Prefix | None, rows: Rows, packed: Packed, positions_rt: jax.Array, blocks: int
) -> Earlier | None:
    """What parts attend to besides themselves: the prefix, and the first `blocks` of the cache of a single part."""
    if prefix is None and not blocks:
        return None
    first = 0 if prefix is None else prefix.length

    def of_row(layered: Layered) -> jax.Array:
        """The cache of the part's row, as a stack."""
        if isinstance(layered, jax.Array):
            return jnp.take(layered, packed.row_j[0], axis=1, mode="clip")
        return jnp.stack([jnp.take(cache, packed.row_j[0], axis=0, mode="clip") for cache in layered])

    cached = [(of_row(block.k), of_row(block.v)) for block in rows.blocks[:blocks]]

    def earlier(layer: int | jax.Array) -> list[Seen]:
        from_rt = model.config.first_visible(layer, positions_rt)
        parts = [] if prefix is None else [prefix_of(prefix, layer, from_rt)]
        for block, (k_lksn, v_lkns) in enumerate(cached):
            slot_s = jnp.arange(rows.firsts[block], rows.firsts[block + 1])
            visible_rts = (slot_s < packed.slot_rt[0, 0]) & (first + slot_s >= from_rt[:, :, None])
            parts.append(Seen(layer_of(k_lksn, layer), layer_of(v_lkns, layer), visible_rts))
        return parts

    return earlier


def _scores(model: Llama, hidden_1md: jax.Array, target_rt: jax.Array, alternatives: int) -> LogProbabilities:
    """Log-probabilities of the targets, with the logits of `SCORED_TOGETHER` positions at a time."""
    _, length, width = hidden_1md.shape
    size = SCORED_TOGETHER if length % SCORED_TOGETHER == 0 else length

    def of_chunk(chunk: tuple[jax.Array, jax.Array]) -> LogProbabilities:
        hidden_cd, target_c = chunk
        return log_probabilities(model.logits(hidden_cd[None])[0], target_c, alternatives)

    scores = jax.lax.map(of_chunk, (hidden_1md.reshape(-1, size, width), target_rt.reshape(-1, size)))
    return jax.tree.map(lambda values: values.reshape(length, *values.shape[2:]), scores)


def attend_in_rows(
    config: LlamaConfig,
    layer: int | jax.Array,
    prefix: Prefix | None,
    blocks: Sequence[tuple[jax.Array, jax.Array]],
    length_b: jax.Array,
    recent: Recent,
    made: Numbers,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
) -> jax.Array:
    """Attention of the next token of each row, in one layer, to the prefix, the cache, `made` recent tokens and itself;
    `blocks`, the keys and values of each block, and `recent` are those of this layer."""
    # Positions of the first token in the caches, of the first recent token, and of this token.
    first_b = positions(prefix, jnp.zeros_like(length_b), 0)
    first_recent_b, position_b = first_b + length_b, first_b + length_b + made
    from_b1 = config.first_visible(layer, position_b[:, None])

    def visible(position_b: jax.Array, slots: int, end_b: jax.Array) -> jax.Array:
        """Whether each of `slots`, at positions from `position_b` on, is filled and in the window: [b, 1, s]."""
        position_bs = position_b[:, None] + jnp.arange(slots)
        return ((position_bs < end_b[:, None]) & (position_bs >= from_b1))[:, None, :]

    parts = [prefix_of(prefix, layer, from_b1)] if prefix is not None else []
    first = 0
    for k_bksn, v_bkns in blocks:
        slots = v_bkns.shape[-1]
        parts.append(Seen(k_bksn, v_bkns, visible(first_b + first, slots, first_recent_b)))
        first += slots
    parts.append(Seen(*recent, visible(first_recent_b, recent.k_bkmn.shape[-2], position_b)))
    return attend_to(config, q, *parts, Seen(as_keys(k), as_values(v), jnp.array(True)))


def with_recent(blocks: tuple[Block, ...], length_b: jax.Array, recent: Recent) -> tuple[Block, ...]:
    """The caches after writing recent keys and values of the first rows, which had `length_b` tokens. Ended rows may
    run past their cache, where writes are ignored."""
    slot_bm = length_b[:, None] + jnp.arange(recent.k_bkmn.shape[-2])
    row_b1 = jnp.arange(len(length_b))[:, None]
    return written_at(blocks, row_b1, slot_bm, jnp.moveaxis(recent.k_bkmn, -2, -3), jnp.moveaxis(recent.v_bknm, -1, -3))


def _keys(seed_b: jax.Array, step_b: jax.Array) -> jax.Array:
    return jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))(seed_b, step_b)
