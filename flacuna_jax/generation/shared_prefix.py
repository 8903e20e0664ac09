"""Texts with a common prefix: its keys and values are computed once, and every row attends to them.

For example, all questions of a subject share a few-shot header. `score` gives log-probabilities of tokens in packed
rows; `continuation` generates after a prefix. Shape suffixes: l layers, b rows, t tokens of a row, s cache slots,
p prefix tokens, h heads, k key/value heads, g heads per kv head, n head_dim, m scored positions, d model, v vocabulary.

Caches have keys as [..., s, n] and values as [..., n, s]: the contracted axis is last, so adding a token transposes
nothing as large as a cache. (With another order, XLA also does not support the bfloat16 products on CPUs.)
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flacuna_jax.kernels.attention import attention
from flacuna_jax.kernels.packed_mask import make_packed_mask
from flacuna_jax.kernels.products import times_matrices
from flacuna_jax.kernels.softcap import capped
from flacuna_jax.model.llama import Llama, LlamaConfig
from flacuna_jax.model.lora import select_columns
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.model.rope import Rope

SCORED_TOGETHER = 128
"""Number of positions whose logits exist at the same time."""
MASKED = -1e30

Params = Mapping[str, jax.Array]


class Prefix(NamedTuple):
    """Keys and values of a prefix, padded after `length` (int32 scalar) to a compiled size."""

    k_lkpn: jax.Array
    v_lknp: jax.Array
    length: jax.Array


@functools.partial(jax.jit, static_argnames=("spec",))
def compute_prefix(spec: ModelSpec, params: Params, tokens_p: jax.Array, length: jax.Array) -> Prefix:
    """The prefix of `length` tokens; `tokens_p` int32 is padded after them."""
    segment_ids_bt = (jnp.arange(tokens_p.size) < length).astype(jnp.int32)[None]
    positions_bt = jnp.arange(tokens_p.size, dtype=jnp.int32)[None]
    _, k_lbtkn, v_lbtkn = forward(spec.merge(params), tokens_p[None], positions_bt, segment_ids_bt)
    return Prefix(as_keys(k_lbtkn)[:, 0], as_values(v_lbtkn)[:, 0], length.astype(jnp.int32))


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

    The prefix precedes each document of a row; `positions_bt` count from the document's own start. The number of scored
    positions must be a multiple of `SCORED_TOGETHER`.
    """
    model = spec.merge(params)
    positions_bt, earlier = after(model, prefix, positions_bt)
    hidden_btd, _, _ = forward(model, tokens_bt, positions_bt, segment_ids_bt, earlier)
    hidden_cmd = hidden_btd.reshape(-1, hidden_btd.shape[-1])[at_m].reshape(-1, SCORED_TOGETHER, hidden_btd.shape[-1])

    def of_chunk(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden_md, target_m = chunk
        logits_mv = model.logits(hidden_md[None])[0]
        chosen_m = jnp.take_along_axis(logits_mv, target_m[:, None], axis=1)[:, 0]
        return chosen_m - jax.nn.logsumexp(logits_mv, axis=1), jnp.argmax(logits_mv, axis=1) == target_m

    log_probability, is_greedy = jax.lax.map(of_chunk, (hidden_cmd, target_m.reshape(-1, SCORED_TOGETHER)))
    return log_probability.reshape(-1), is_greedy.reshape(-1)


class Seen(NamedTuple):
    """Keys [b, k, s, n] and values [b, k, n, s], without b if all rows share them, and their visibility to queries, a
    bool array that broadcasts to [b, t, s]."""

    k: jax.Array
    v: jax.Array
    visible: jax.Array


def as_keys(x: jax.Array) -> jax.Array:
    """[..., t, k, n] as [..., k, t, n]."""
    return jnp.swapaxes(x, -3, -2)


def as_values(x: jax.Array) -> jax.Array:
    """[..., t, k, n] as [..., k, n, t]."""
    return jnp.moveaxis(x, -3, -1)


Earlier = Callable[[int | jax.Array], list[Seen]]
"""Maps a layer to the keys and values before those of a forward pass itself."""


def forward(
    model: Llama,
    tokens_bt: jax.Array,
    positions_bt: jax.Array,
    segment_ids_bt: jax.Array,
    earlier: Earlier | None = None,
    columns_b2: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hidden states [b, t, d] of documents, and their own keys and values [l, b, t, k, n].

    Args:
      positions_bt: absolute, so they include the tokens of `earlier`.
      earlier: keys and values that each document attends to besides its own.
      columns_b2: the columns of each row's adapter (`lora.select_columns`).
    """
    config = model.config
    masks = config.masks(make_packed_mask(segment_ids_bt))
    position_t = jnp.arange(tokens_bt.shape[1])

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: int | jax.Array) -> jax.Array:
        mask = config.in_layer(layer, *masks)
        if earlier is None:
            return attention(q, k, v, mask, scale=config.attention_scale, softcap=config.attention_softcap)
        visible_bts = (mask.start_bt[:, :, None] <= position_t) & (position_t <= position_t[:, None])
        return attend_to(config, q, *earlier(layer), Seen(as_keys(k), as_values(v), visible_bts))

    return through_layers(model, tokens_bt, positions_bt, attend, columns_b2=columns_b2)


def after(model: Llama, prefix: Prefix | None, positions_bt: jax.Array) -> tuple[jax.Array, Earlier | None]:
    """Positions counted from the end of the prefix as absolute ones, and the prefix as what is attended to."""
    if prefix is None:
        return positions_bt, None
    positions_bt = positions_bt + prefix.length
    return positions_bt, lambda layer: [prefix_of(prefix, layer, model.config.first_visible(layer, positions_bt))]


def layer_of(stacked: jax.Array, layer: int | jax.Array) -> jax.Array:
    """One layer of a stack."""
    return jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False)


def prefix_of(prefix: Prefix, layer: int | jax.Array, from_bt: jax.Array) -> Seen:
    """A layer's keys and values of the prefix, visible from the position `from_bt` on to each query."""
    position_p = jnp.arange(prefix.k_lkpn.shape[-2])
    visible_btp = (position_p < prefix.length) & (position_p >= from_bt[:, :, None])
    return Seen(layer_of(prefix.k_lkpn, layer), layer_of(prefix.v_lknp, layer), visible_btp)


def attend_to(config: LlamaConfig, q_bthn: jax.Array, *parts: Seen) -> jax.Array:
    """Softmax attention over all parts together, with statistics in float32."""
    batch, length, _, size = q_bthn.shape
    kv_heads = parts[0].k.shape[-3]
    # The queries of the heads of a kv head, one head after the other.
    q_bkmn = jnp.moveaxis(q_bthn.reshape(batch, length, kv_heads, -1, size), 1, 3).reshape(batch, kv_heads, -1, size)
    scores = []
    for part in parts:
        product_bkgts = times_matrices(q_bkmn, part.k).reshape(batch, kv_heads, -1, length, part.k.shape[-2])
        visible = part.visible[:, None, None] if part.visible.ndim == 3 else part.visible
        score_bkgts = capped(product_bkgts * config.attention_scale, config.attention_softcap)
        scores.append(jnp.where(visible, score_bkgts, MASKED))
    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(q_bthn.dtype)
    weights_bkms = weights.reshape(*q_bkmn.shape[:-1], -1)
    o_bkmn = jnp.zeros(q_bkmn.shape, jnp.float32)
    begin = 0
    for part in parts:
        o_bkmn += times_matrices(weights_bkms[..., begin : begin + part.v.shape[-1]], part.v)
        begin += part.v.shape[-1]
    o_btkgn = jnp.moveaxis(o_bkmn.reshape(batch, kv_heads, -1, length, size), 3, 1)
    return o_btkgn.reshape(q_bthn.shape).astype(q_bthn.dtype)


Attend = Callable[[jax.Array, jax.Array, jax.Array, int | jax.Array], jax.Array]


def through_layers(
    model: Llama,
    tokens_bt: jax.Array,
    positions_bt: jax.Array,
    attend: Attend,
    columns_b2: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hidden states after the final norm [b, t, d], and the keys and values of these tokens in all layers, both
    [l, b, t, k, n].

    `Llama.__call__` is the same walk for training: with remat, dropout and packed masks, and without keys and values.

    Args:
      attend: (q, k, v, layer) to o.
      columns_b2: the columns of each row's adapter (`lora.select_columns`).
    """
    ropes = model.config.ropes_at(positions_bt)
    graph, stacked = nnx.split(model.layers)

    def apply_block(x_btd: jax.Array, layer: tuple[jax.Array, nnx.State]) -> tuple[jax.Array, Any]:
        index, state = layer
        return through_layer(model.config, graph, state, index, x_btd, ropes, attend, columns_b2)

    stack = (jnp.arange(model.config.num_layers), stacked)
    x_btd, (k_lbtkn, v_lbtkn) = jax.lax.scan(apply_block, model.embed(tokens_bt), stack)
    return model.final(x_btd), k_lbtkn, v_lbtkn


def through_layer(
    config: LlamaConfig,
    graph: nnx.GraphDef,
    state: nnx.State,
    index: jax.Array,
    x_btd: jax.Array,
    ropes: tuple[Rope, Rope],
    attend: Attend,
    columns_b2: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The output of one layer, whose parameters are `state`, and its keys and values."""
    made: list[tuple[jax.Array, jax.Array]] = []

    def attend_here(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        made.append((k, v))
        return attend(q, k, v, index)

    if columns_b2 is not None:
        state = select_columns(state, columns_b2)
    x_btd = nnx.merge(graph, state)(x_btd, config.rope_in(index, ropes), attend_here)
    return x_btd, made[0]
