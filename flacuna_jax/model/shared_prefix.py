"""Many texts with one beginning: the beginning's keys and values are computed once, and every row attends to them.

A few-shot header serves a whole subject. `score` gives log-probabilities of tokens in packed rows; `begin` and
`advance` continue prompts in rows that come and go, each with a cache of its own length. Suffixes: l layers, b rows,
r rows that begin, t tokens of a row, s cache slots, p prefix tokens, h heads, k key/value heads, g heads per kv head,
n head_dim, m scored positions, d model, v vocabulary.

Caches hold keys as [..., s, n] and values as [..., n, s]: what is summed over comes last, and nothing as large as a
cache is transposed when a token is added. (With another order XLA also refuses bfloat16 products on CPUs.)
"""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flacuna_jax.kernels.attention import attention
from flacuna_jax.model.decode import Sampling, choose_tokens
from flacuna_jax.model.llama import Llama
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.model.rope import Rope

SCORED_TOGETHER = 128
"""Positions whose logits exist at the same time."""
MASKED = -1e30

Params = Mapping[str, jax.Array]


class Prefix(NamedTuple):
    """Keys and values of a beginning, padded behind `length` (int32 scalar) to a size that is compiled for."""

    k_lkpn: jax.Array
    v_lknp: jax.Array
    length: jax.Array


class Rows(NamedTuple):
    """Prompts in the middle of being continued; `length_b` tokens of row b are in its cache, `token_b` is the next."""

    k_lbksn: jax.Array
    v_lbkns: jax.Array
    length_b: jax.Array
    token_b: jax.Array
    made_b: jax.Array
    """New tokens so far, `token_b` included: the step that sampling keys are folded with."""
    seed_b: jax.Array


@functools.partial(jax.jit, static_argnames=("spec",))
def compute_prefix(spec: ModelSpec, params: Params, tokens_p: jax.Array, length: jax.Array) -> Prefix:
    """The prefix of `length` tokens; `tokens_p` int32 is padded behind them."""
    segment_ids_bt = (jnp.arange(tokens_p.size) < length).astype(jnp.int32)[None]
    positions_bt = jnp.arange(tokens_p.size, dtype=jnp.int32)[None]
    _, k_lbtkn, v_lbtkn = _forward(spec.merge(params), tokens_p[None], positions_bt, segment_ids_bt, None)
    return Prefix(_as_keys(k_lbtkn)[:, 0], _as_values(v_lbtkn)[:, 0], length.astype(jnp.int32))


@functools.partial(jax.jit, static_argnames=("spec",))
def score(
    spec: ModelSpec,
    params: Params,
    prefix: Prefix | None,
    tokens_bt: jax.Array,
    positions_bt: jax.Array,
    segment_ids_bt: jax.Array,
    at_m: jax.Array,
    target_m: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability (float32, nats) of `target_m` after the tokens at the flat positions `at_m` of the rows, and
    whether it is the most likely one.

    Each document of a row stands behind the prefix; `positions_bt` count from its own start. The number of scored
    positions is a multiple of `SCORED_TOGETHER`.
    """
    model = spec.merge(params)
    hidden_btd, _, _ = _forward(model, tokens_bt, positions_bt, segment_ids_bt, prefix)
    hidden_cmd = hidden_btd.reshape(-1, hidden_btd.shape[-1])[at_m].reshape(-1, SCORED_TOGETHER, hidden_btd.shape[-1])

    def of_chunk(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden_md, target_m = chunk
        logits_mv = model.logits(hidden_md[None])[0]
        chosen_m = jnp.take_along_axis(logits_mv, target_m[:, None], axis=1)[:, 0]
        return chosen_m - jax.nn.logsumexp(logits_mv, axis=1), jnp.argmax(logits_mv, axis=1) == target_m

    log_probability, is_greedy = jax.lax.map(of_chunk, (hidden_cmd, target_m.reshape(-1, SCORED_TOGETHER)))
    return log_probability.reshape(-1), is_greedy.reshape(-1)


def empty_rows(spec: ModelSpec, rows: int, slots: int) -> Rows:
    config = spec.config
    outer = (config.num_layers, rows, config.num_kv_heads)
    return Rows(
        jnp.zeros((*outer, slots, config.head_dim), spec.dtype),
        jnp.zeros((*outer, config.head_dim, slots), spec.dtype),
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
    """Puts prompts (less the prefix, padded behind `length_r`) into the rows `into_r` and chooses their first tokens.

    A row number beyond the rows is dropped, so that a part-filled group needs no compilation of its own.
    """
    model = spec.merge(params)
    count, length = tokens_rt.shape
    segment_ids_rt = (jnp.arange(length) < length_r[:, None]).astype(jnp.int32)
    positions_rt = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (count, length))
    hidden_rtd, k_lrtkn, v_lrtkn = _forward(model, tokens_rt, positions_rt, segment_ids_rt, prefix)
    last_r1d = jnp.take_along_axis(hidden_rtd, (length_r - 1)[:, None, None], axis=1)
    token_r = choose_tokens(model.logits(last_r1d)[:, 0], _keys(seed_r, jnp.zeros_like(length_r)), 0, sampling)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[into_r].set(new.astype(old.dtype), mode="drop")

    return Rows(
        rows.k_lbksn.at[:, into_r, :, :length].set(_as_keys(k_lrtkn), mode="drop"),
        rows.v_lbkns.at[:, into_r, :, :, :length].set(_as_values(v_lrtkn), mode="drop"),
        put(rows.length_b, length_r),
        put(rows.token_b, token_r),
        put(rows.made_b, jnp.ones_like(length_r)),
        put(rows.seed_b, seed_r),
    ), token_r


@functools.partial(jax.jit, static_argnames=("spec", "steps", "reach", "sampling"), donate_argnames=("rows",))
def advance(
    spec: ModelSpec, params: Params, prefix: Prefix | None, rows: Rows, steps: int, reach: int, sampling: Sampling
) -> tuple[Rows, jax.Array]:
    """`steps` more tokens for every row, int32 [b, steps]; rows that have ended go along, their tokens mean nothing.

    Only the first `reach` slots of the caches are looked at: no row that goes on may be longer, new tokens included.
    """
    model = spec.merge(params)

    def step(rows: Rows, _: None) -> tuple[Rows, jax.Array]:
        logits_bv, rows = _extend(model, rows, prefix, reach)
        token_b = choose_tokens(logits_bv, _keys(rows.seed_b, rows.made_b), 0, sampling)
        return rows._replace(token_b=token_b, made_b=rows.made_b + 1), token_b

    rows, token_mb = jax.lax.scan(step, rows, None, length=steps)
    return rows, token_mb.T


def _keys(seed_b: jax.Array, step_b: jax.Array) -> jax.Array:
    return jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))(seed_b, step_b)


class Seen(NamedTuple):
    """Keys [b, k, s, n] and values [b, k, n, s], without b where all rows share them, and which of them queries see, as
    bool that broadcasts to [b, t, s]."""

    k: jax.Array
    v: jax.Array
    visible: jax.Array


def _as_keys(x: jax.Array) -> jax.Array:
    """[..., t, k, n] as [..., k, t, n]."""
    return jnp.swapaxes(x, -3, -2)


def _as_values(x: jax.Array) -> jax.Array:
    """[..., t, k, n] as [..., k, n, t]."""
    return jnp.moveaxis(x, -3, -1)


def _forward(
    model: Llama, tokens_bt: jax.Array, positions_bt: jax.Array, segment_ids_bt: jax.Array, prefix: Prefix | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hidden states [b, t, d] of documents behind the prefix, and their own keys and values [l, b, t, k, n]."""
    mask = model.mask(segment_ids_bt)
    position_t = jnp.arange(tokens_bt.shape[1])
    visible_bts = (mask.start_bt[:, :, None] <= position_t) & (position_t <= position_t[:, None])

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array) -> jax.Array:
        if prefix is None:
            return attention(q, k, v, mask)
        return _attend(q, _prefix_of(prefix, layer, from_bt), Seen(_as_keys(k), _as_values(v), visible_bts))

    if prefix is not None:
        positions_bt = positions_bt + prefix.length
    from_bt = _first_visible(model, positions_bt)
    hidden_btd, (k_lbtkn, v_lbtkn) = _through_layers(model, tokens_bt, positions_bt, attend)
    return hidden_btd, k_lbtkn, v_lbtkn


def _extend(model: Llama, rows: Rows, prefix: Prefix | None, reach: int) -> tuple[jax.Array, Rows]:
    """Adds `token_b` to the caches; logits [b, v] of what follows."""
    position_b = rows.length_b if prefix is None else rows.length_b + prefix.length
    from_bt = _first_visible(model, position_b[:, None])
    slots_s = jnp.arange(reach) + (position_b - rows.length_b)[:, None]
    earlier_bts = ((slots_s < position_b[:, None]) & (slots_s >= from_bt))[:, None, :]

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array) -> jax.Array:
        cached = Seen(_layer_of(rows.k_lbksn, layer, -2, reach), _layer_of(rows.v_lbkns, layer, -1, reach), earlier_bts)
        before = [_prefix_of(prefix, layer, from_bt)] if prefix is not None else []
        return _attend(q, *before, cached, Seen(_as_keys(k), _as_values(v), jnp.array(True)))

    hidden_btd, (k_lbtkn, v_lbtkn) = _through_layers(model, rows.token_b[:, None], position_b[:, None], attend)
    row_b = jnp.arange(len(rows.token_b))
    new_k_blkn, new_v_blkn = (jnp.swapaxes(new[:, :, 0], 0, 1) for new in (k_lbtkn, v_lbtkn))
    after = rows._replace(
        # Rows that have ended may run past their cache, where writing is dropped.
        k_lbksn=rows.k_lbksn.at[:, row_b, :, rows.length_b].set(new_k_blkn, mode="drop"),
        v_lbkns=rows.v_lbkns.at[:, row_b, :, :, rows.length_b].set(new_v_blkn, mode="drop"),
        length_b=rows.length_b + 1,
    )
    return model.logits(hidden_btd)[:, 0], after


def _layer_of(stacked: jax.Array, layer: jax.Array, axis: int = -1, size: int | None = None) -> jax.Array:
    """One layer, and of that the first `size` along `axis`: in one cut, since each is a copy on CPUs."""
    sizes = [1, *stacked.shape[1:]]
    if size is not None:
        sizes[axis] = size
    return jax.lax.dynamic_slice(stacked, (layer, *[0] * (stacked.ndim - 1)), sizes)[0]


def _prefix_of(prefix: Prefix, layer: jax.Array, from_bt: jax.Array) -> Seen:
    position_p = jnp.arange(prefix.k_lkpn.shape[-2])
    visible_btp = (position_p < prefix.length) & (position_p >= from_bt[:, :, None])
    return Seen(_layer_of(prefix.k_lkpn, layer), _layer_of(prefix.v_lknp, layer), visible_btp)


def _first_visible(model: Llama, positions_bt: jax.Array) -> jax.Array:
    """The first position that each query may see, counted as `positions_bt` is."""
    window = model.config.sliding_window
    return jnp.zeros_like(positions_bt) if window is None else positions_bt - (window - 1)


def _attend(q_bthn: jax.Array, *parts: Seen) -> jax.Array:
    """Softmax attention over all parts together, statistics in float32."""
    batch, length, _, size = q_bthn.shape
    q_btkgn = q_bthn.reshape(batch, length, parts[0].k.shape[-3], -1, size)
    scores = []
    for part in parts:
        keys = "ksn" if part.k.ndim == 3 else "bksn"
        seen = jnp.einsum(f"btkgn,{keys}->bkgts", q_btkgn, part.k, preferred_element_type=jnp.float32) * size**-0.5
        visible = part.visible[:, None, None] if part.visible.ndim == 3 else part.visible
        scores.append(jnp.where(visible, seen, MASKED))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(q_bthn.dtype)
    o_btkgn = jnp.zeros(q_btkgn.shape, jnp.float32)
    begin = 0
    for part in parts:
        values = "kns" if part.v.ndim == 3 else "bkns"
        of_part = weights[..., begin : begin + part.v.shape[-1]]
        o_btkgn += jnp.einsum(f"bkgts,{values}->btkgn", of_part, part.v, preferred_element_type=jnp.float32)
        begin += part.v.shape[-1]
    return o_btkgn.reshape(q_bthn.shape).astype(q_bthn.dtype)


Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def _through_layers(
    model: Llama, tokens_bt: jax.Array, positions_bt: jax.Array, attend: Attend
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Hidden states after the final norm, and what the layers had as keys and values of these tokens."""
    rope = Rope.at(positions_bt, model.config.rope_frequencies)
    graph, stacked = nnx.split(model.layers)

    def apply_block(x_btd: jax.Array, layer: tuple[jax.Array, nnx.State]) -> tuple[jax.Array, tuple]:
        index, state = layer
        made: list[tuple[jax.Array, jax.Array]] = []

        def attend_here(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            made.append((k, v))
            return attend(q, k, v, index)

        x_btd = nnx.merge(graph, state)(x_btd, rope, attend_here)
        return x_btd, made[0]

    layers = (jnp.arange(model.config.num_layers), stacked)
    x_btd, keys_and_values = jax.lax.scan(apply_block, model.embed(tokens_bt), layers)
    return model.norm(x_btd), keys_and_values
