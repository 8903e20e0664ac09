"""Chooses the next token from logits: greedily, or by sampling with temperature, top_k and top_p, each row with its own
settings.

Shape suffixes: b rows, v vocabulary, a alternatives.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flacuna_jax.generation.settings import METHODS, Method, Sampling

DRAWN_TOGETHER = 256
"""Tokens whose probabilities are summed together to draw one."""

Numbers = jax.Array | np.ndarray


def most_general(samplings: Iterable[Sampling]) -> Method:
    """The method that serves all of the settings."""
    return max((sampling.method for sampling in samplings), key=METHODS.index, default="greedy")


class RowSampling(NamedTuple):
    """The settings of each row."""

    temperature_b: Numbers
    """float32; 0 is greedy."""
    top_k_b: Numbers
    """int32; a number of at least the vocabulary's size keeps every token."""
    top_p_b: Numbers
    """float32; 1 keeps every token."""

    @classmethod
    def of(cls, samplings: Sequence[Sampling]) -> "RowSampling":
        everything = np.iinfo(np.int32).max
        return cls(
            np.array([sampling.temperature for sampling in samplings], np.float32),
            np.array([min(sampling.top_k or everything, everything) for sampling in samplings], np.int32),
            np.array([sampling.top_p or 1.0 for sampling in samplings], np.float32),
        )


def choose_tokens(logits_bv: jax.Array, keys_b: jax.Array, sampling: RowSampling, method: Numbers | int) -> jax.Array:
    """The next token of each row, int32 [b].

    Args:
      method: index in `METHODS`; it must serve the settings of every row whose token is used. Only what it needs is
        computed, in the same program.
    """
    largest_b = _first_largest(logits_bv)
    is_greedy_b = sampling.temperature_b == 0

    def scaled() -> jax.Array:
        return logits_bv / jnp.where(is_greedy_b, 1.0, sampling.temperature_b)[:, None]

    def drawn(logits_bv: jax.Array) -> jax.Array:
        return jnp.where(is_greedy_b, largest_b, _drawn(logits_bv, keys_b))

    branches = (
        lambda: largest_b,
        lambda: drawn(scaled()),
        lambda: drawn(_keep_likely(scaled(), sampling.top_k_b, sampling.top_p_b)),
    )
    return jax.lax.switch(method, branches)


def _drawn(logits_bv: jax.Array, keys_b: jax.Array) -> jax.Array:
    """A token of each row, with the probabilities of its logits: the first at which their running sum exceeds a uniform
    number. The sum runs over groups of tokens, then within the group, which needs one number for each row instead of
    one for each token."""
    weight_bv = jnp.exp(logits_bv - jnp.max(logits_bv, axis=-1, keepdims=True))
    missing = -weight_bv.shape[-1] % DRAWN_TOGETHER
    weight_bgc = jnp.pad(weight_bv, ((0, 0), (0, missing))).reshape(len(weight_bv), -1, DRAWN_TOGETHER)
    end_bg = jnp.cumsum(jnp.sum(weight_bgc, axis=-1), axis=-1)
    group_b, rest_b = _first_above(end_bg, jax.vmap(jax.random.uniform)(keys_b) * end_bg[:, -1])
    weight_bc = jnp.take_along_axis(weight_bgc, group_b[:, None, None], axis=1)[:, 0]
    within_b, _ = _first_above(jnp.cumsum(weight_bc, axis=-1), rest_b)
    return (group_b * DRAWN_TOGETHER + within_b).astype(jnp.int32)


def _first_above(end_bi: jax.Array, target_b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first index at which running sums exceed a target, and what the target exceeds the sum before it by. A target
    that rounding made too large is moved below the last sum, so that the index is never one that adds nothing."""
    target_b1 = jnp.minimum(target_b, jnp.nextafter(end_bi[:, -1], 0.0))[:, None]
    is_before_bi = end_bi <= target_b1
    before_b = jnp.max(jnp.where(is_before_bi, end_bi, 0.0), axis=-1)
    return jnp.sum(is_before_bi, axis=-1), target_b1[:, 0] - before_b


class LogProbabilities(NamedTuple):
    """Log-probabilities in nats, float32, of a token and of the most likely ones (int32), in decreasing order."""

    of_token_b: jax.Array
    tokens_ba: jax.Array
    of_tokens_ba: jax.Array


def log_probabilities(logits_bv: jax.Array, token_b: jax.Array, alternatives: int) -> LogProbabilities:
    """Before temperature and filters."""
    total_b1 = jax.nn.logsumexp(logits_bv, axis=-1, keepdims=True)
    largest_ba, tokens_ba = jax.lax.top_k(logits_bv, min(alternatives, logits_bv.shape[-1]))
    of_token_b1 = jnp.take_along_axis(logits_bv, token_b[:, None], axis=-1) - total_b1
    return LogProbabilities(of_token_b1[:, 0], tokens_ba.astype(jnp.int32), largest_ba - total_b1)


def _first_largest(logits_bv: jax.Array) -> jax.Array:
    """argmax as two plain reductions, which XLA runs four times as fast as its argmax on CPUs."""
    last = logits_bv.shape[-1] - 1
    is_largest_bv = logits_bv == jnp.max(logits_bv, axis=-1, keepdims=True)
    # NaN logits equal nothing; any token will do then.
    return jnp.min(jnp.where(is_largest_bv, jnp.arange(last + 1, dtype=jnp.int32), last), axis=-1)


def _keep_likely(logits_bv: jax.Array, top_k_b: Numbers, top_p_b: Numbers) -> jax.Array:
    """Logits with everything outside top_k and then outside top_p at minus infinity."""
    descending_bv = jnp.sort(logits_bv, axis=-1, descending=True)
    last = logits_bv.shape[-1] - 1
    lowest_b1 = jnp.take_along_axis(descending_bv, jnp.minimum(top_k_b - 1, last)[:, None], axis=-1)
    descending_bv = jnp.where(descending_bv < lowest_b1, -jnp.inf, descending_bv)
    probabilities_bv = jax.nn.softmax(descending_bv, axis=-1)
    before_bv = jnp.cumsum(probabilities_bv, axis=-1) - probabilities_bv
    # Sums in float32 may reach 1 before the last token.
    kept_bv = ((before_bv < top_p_b[:, None]) | (top_p_b[:, None] == 1)) & (descending_bv > -jnp.inf)
    lowest_b1 = jnp.min(jnp.where(kept_bv, descending_bv, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_bv < lowest_b1, -jnp.inf, logits_bv)
