"""Decoding with a key/value cache: prompts of mixed lengths in one batch, one compilation per prompt length bucket.

Prompts are aligned at their ends: row r of a batch starts at slot `first[r]`, and every row writes its next token into
the same slot. The cache is static, [layers, batch, slots, kv_heads, head_dim], and is updated in place by the loop.
Suffixes: b batch, t new tokens, m all new tokens, s cache slots, h heads, k key/value heads, g heads per kv head,
n head_dim, v vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flacuna_jax.errors import UserError
from flacuna_jax.kernels.attention import attention
from flacuna_jax.kernels.packed_mask import make_packed_mask
from flacuna_jax.model.llama import Llama, Rope
from flacuna_jax.model.parameters import ModelSpec

PROMPT_BUCKET = 64
"""Prompts are padded to a multiple of this many tokens, so that few lengths are ever compiled."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Filters apply in the order temperature, top_k, top_p, as in transformers."""

    temperature: float = 0.0
    """0 takes the most likely token (greedy); otherwise logits are divided by it."""
    top_k: int | None = None
    """Keep only this many of the most likely tokens."""
    top_p: float | None = None
    """Keep the smallest set of most likely tokens whose probabilities reach this sum."""

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature is {self.temperature}; use 0 for greedy decoding or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; keep at least one token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it is a probability above 0 and at most 1")


GREEDY = Sampling()


class Cache(NamedTuple):
    k_lbskn: jax.Array
    v_lbskn: jax.Array

    def write(self, layer: jax.Array, slot: jax.Array | int, k_btkn: jax.Array, v_btkn: jax.Array) -> "Cache":
        at = (layer, 0, slot, 0, 0)
        return Cache(
            jax.lax.dynamic_update_slice(self.k_lbskn, k_btkn[None], at),
            jax.lax.dynamic_update_slice(self.v_lbskn, v_btkn[None], at),
        )


def generate(
    spec: ModelSpec,
    params: Mapping[str, jax.Array],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling = GREEDY,
    seed: int = 0,
    batch_size: int = 16,
) -> list[list[int]]:
    """Continues each prompt until a stop id or `max_new_tokens`.

    What a prompt gets does not depend on the other prompts or on the batch size (up to rounding): sampling keys are
    folded from (seed, index of the prompt, step).

    Args:
      spec, params: the network, with its adapters if it has any.
      prompts: token ids, BOS included where the template has one.
      stop_ids: tokens that end a continuation; they are not returned.
      batch_size: prompts decoded together; similar lengths are put side by side.

    Returns:
      New token ids per prompt, in the order of the prompts.

    Raises:
      UserError: an empty prompt, or one that leaves no room for `max_new_tokens` in the model's context.
    """
    _check(spec, prompts, max_new_tokens)
    stops = np.array(sorted(stop_ids), np.int32)
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    continuations: dict[int, list[int]] = {}
    for begin in range(0, len(by_length), batch_size):
        indices = by_length[begin : begin + batch_size]
        rows = indices + indices[-1:] * (min(batch_size, len(prompts)) - len(indices))  # one shape for every batch
        tokens_bt, first_b = _align(
            [prompts[index] for index in rows], spec.config.max_position_embeddings - max_new_tokens
        )
        new_bm = _decode(
            spec,
            dict(params),
            tokens_bt,
            first_b,
            np.array(rows, np.uint32),
            stops,
            np.uint32(seed),
            max_new_tokens,
            sampling,
        )
        for index, new_m in zip(indices, np.asarray(new_bm), strict=False):
            ended = np.flatnonzero(np.isin(new_m, stops))
            continuations[index] = new_m[: ended[0] if ended.size else None].tolist()
    return [continuations[index] for index in range(len(prompts))]


def _check(spec: ModelSpec, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    context = spec.config.max_position_embeddings
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {index + 1} is empty")
        if len(prompt) + max_new_tokens > context:
            raise UserError(
                f"prompt {index + 1} has {len(prompt)} tokens; with {max_new_tokens} new ones it exceeds the model's "
                f"context of {context}: shorten the prompt or ask for fewer new tokens"
            )


def _align(prompts: Sequence[Sequence[int]], longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts [b, t] aligned at the right, zeros before them, and the slot where each begins [b]."""
    needed = max(map(len, prompts))
    length = max(needed, min(math.ceil(needed / PROMPT_BUCKET) * PROMPT_BUCKET, longest))
    tokens_bt = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(tokens_bt, prompts, strict=True):
        row[length - len(prompt) :] = prompt
    return tokens_bt, np.array([length - len(prompt) for prompt in prompts], np.int32)


@functools.partial(jax.jit, static_argnames=("spec", "max_new_tokens", "sampling"))
def _decode(
    spec: ModelSpec,
    params: Mapping[str, jax.Array],
    tokens_bt: jax.Array,
    first_b: jax.Array,
    prompt_ids_b: jax.Array,
    stop_ids: jax.Array,
    seed: jax.Array,
    max_new_tokens: int,
    sampling: Sampling,
) -> jax.Array:
    """New tokens int32 [b, max_new_tokens]; what follows a row's first stop id has no meaning."""
    model = spec.merge(params)
    batch, length = tokens_bt.shape
    keys_b = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), prompt_ids_b)
    choose = functools.partial(choose_tokens, sampling=sampling)

    logits_bv, cache = _prefill(model, tokens_bt, first_b, length + max_new_tokens)
    token_b = choose(logits_bv, keys_b, 0)
    new_bm = jnp.zeros((batch, max_new_tokens), jnp.int32).at[:, 0].set(token_b)

    def unfinished(state: tuple) -> jax.Array:
        count, _, _, ended_b, _ = state
        return (count < max_new_tokens) & ~jnp.all(ended_b)

    def step(state: tuple) -> tuple:
        count, token_b, new_bm, ended_b, cache = state
        logits_bv, cache = _extend(model, token_b, first_b, length + count - 1, cache)
        token_b = choose(logits_bv, keys_b, count)
        return count + 1, token_b, new_bm.at[:, count].set(token_b), ended_b | jnp.isin(token_b, stop_ids), cache

    return jax.lax.while_loop(unfinished, step, (1, token_b, new_bm, jnp.isin(token_b, stop_ids), cache))[2]


def _prefill(model: Llama, tokens_bt: jax.Array, first_b: jax.Array, slots: int) -> tuple[jax.Array, Cache]:
    """Runs the prompts; logits [b, v] after the last token of each, and a cache of `slots` that holds their keys."""
    batch, length = tokens_bt.shape
    positions_bt = jnp.arange(length) - first_b[:, None]
    mask = make_packed_mask((positions_bt >= 0).astype(jnp.int32))
    config = model.config
    empty = jnp.zeros((config.num_layers, batch, slots, config.num_kv_heads, config.head_dim), model.dtype)

    def attend(
        q_bthn: jax.Array, k_btkn: jax.Array, v_btkn: jax.Array, layer: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        return attention(q_bthn, k_btkn, v_btkn, mask), cache.write(layer, 0, k_btkn, v_btkn)

    return _run(model, tokens_bt, jnp.maximum(positions_bt, 0), Cache(empty, empty), attend)


def _extend(
    model: Llama, token_b: jax.Array, first_b: jax.Array, slot: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Adds one token per row in `slot`; logits [b, v] of the next one."""
    slots_s = jnp.arange(cache.k_lbskn.shape[2])
    visible_bs = (slots_s >= first_b[:, None]) & (slots_s <= slot)

    def attend(
        q_bthn: jax.Array, k_btkn: jax.Array, v_btkn: jax.Array, layer: jax.Array, cache: Cache
    ) -> tuple[jax.Array, Cache]:
        cache = cache.write(layer, slot, k_btkn, v_btkn)
        k_bskn, v_bskn = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in cache)
        return _attend_to_cache(q_bthn, k_bskn, v_bskn, visible_bs), cache

    return _run(model, token_b[:, None], (slot - first_b)[:, None], cache, attend)


def _attend_to_cache(q_bthn: jax.Array, k_bskn: jax.Array, v_bskn: jax.Array, visible_bs: jax.Array) -> jax.Array:
    """Softmax attention over the visible slots, statistics in float32."""
    batch, length, heads, size = q_bthn.shape
    q_btkgn = q_bthn.reshape(batch, length, k_bskn.shape[2], -1, size)
    scores = jnp.einsum("btkgn,bskn->bkgts", q_btkgn, k_bskn, preferred_element_type=jnp.float32) * size**-0.5
    weights = jax.nn.softmax(jnp.where(visible_bs[:, None, None, None, :], scores, -jnp.inf), axis=-1)
    o_btkgn = jnp.einsum("bkgts,bskn->btkgn", weights.astype(v_bskn.dtype), v_bskn, preferred_element_type=jnp.float32)
    return o_btkgn.reshape(batch, length, heads, size).astype(q_bthn.dtype)


Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, Cache], tuple[jax.Array, Cache]]


def _run(
    model: Llama, tokens_bt: jax.Array, positions_bt: jax.Array, cache: Cache, attend: Attend
) -> tuple[jax.Array, Cache]:
    """All layers over new tokens; logits [b, v] of the last one, float32, and the cache that `attend` has written."""
    rope = Rope.at(positions_bt, model.config.head_dim, model.config.rope_theta)
    graph, stacked = nnx.split(model.layers)

    def apply_block(carry: tuple[jax.Array, Cache], layer: tuple[jax.Array, nnx.State]) -> tuple[tuple, None]:
        (x_btd, before), (index, state) = carry, layer
        written: list[Cache] = []

        def attend_here(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            o_bthn, after = attend(q, k, v, index, before)
            written.append(after)
            return o_bthn

        x_btd = nnx.merge(graph, state)(x_btd, rope, attend_here)
        return (x_btd, written[0]), None

    layers = (jnp.arange(model.config.num_layers), stacked)
    (x_btd, cache), _ = jax.lax.scan(apply_block, (model.embed(tokens_bt), cache), layers)
    return model.logits(model.norm(x_btd[:, -1:]))[:, 0], cache


def choose_tokens(logits_bv: jax.Array, keys_b: jax.Array, step: jax.Array | int, sampling: Sampling) -> jax.Array:
    """The next token of each row, int32 [b]."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_bv, axis=-1).astype(jnp.int32)
    logits_bv = _keep_likely(logits_bv / sampling.temperature, sampling.top_k, sampling.top_p)
    step_keys_b = jax.vmap(jax.random.fold_in, (0, None))(keys_b, step)
    return jax.vmap(jax.random.categorical)(step_keys_b, logits_bv).astype(jnp.int32)


def _keep_likely(logits_bv: jax.Array, top_k: int | None, top_p: float | None) -> jax.Array:
    """Logits with everything outside top_k and then outside top_p at minus infinity."""
    if top_k is not None and top_k < logits_bv.shape[-1]:
        lowest_b1 = jax.lax.top_k(logits_bv, top_k)[0][:, -1:]
        logits_bv = jnp.where(logits_bv < lowest_b1, -jnp.inf, logits_bv)
    if top_p is not None and top_p < 1:
        descending_bv = jnp.sort(logits_bv, axis=-1, descending=True)
        probabilities_bv = jax.nn.softmax(descending_bv, axis=-1)
        before_bv = jnp.cumsum(probabilities_bv, axis=-1) - probabilities_bv
        lowest_b1 = jnp.min(jnp.where(before_bv < top_p, descending_bv, jnp.inf), axis=-1, keepdims=True)
        logits_bv = jnp.where(logits_bv < lowest_b1, -jnp.inf, logits_bv)
    return logits_bv
