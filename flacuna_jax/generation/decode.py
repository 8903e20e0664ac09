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


def choose_tokens(logits_bv: jax.Array, keys_b: jax.Array, sampling: RowSampling, method: Method) -> jax.Array:
    """The next token of each row, int32 [b]. The method must serve the settings of every row whose token is used."""
    largest_b = _first_largest(logits_bv)
    if method == "greedy":
        return largest_b
    is_greedy_b = sampling.temperature_b == 0
    logits_bv = logits_bv / jnp.where(is_greedy_b, 1.0, sampling.temperature_b)[:, None]
    if method == "filtered":
        logits_bv = _keep_likely(logits_bv, sampling.top_k_b, sampling.top_p_b)
    drawn_b = jax.vmap(jax.random.categorical)(keys_b, logits_bv).astype(jnp.int32)
    return jnp.where(is_greedy_b, largest_b, drawn_b)


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
