"""Chooses the next token from logits: greedily, or by sampling with temperature, top_k and top_p.

Shape suffixes: b rows, v vocabulary.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from flacuna_jax.errors import UserError

LOWEST_TEMPERATURE = 1e-6
"""Logits divided by a much smaller temperature would overflow float32."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling settings. Filters apply in the order temperature, top_k, top_p, as in transformers."""

    temperature: float = 0.0
    """0 chooses the most likely token (greedy); otherwise logits are divided by it."""
    top_k: int | None = None
    """Keep only this many of the most likely tokens."""
    top_p: float | None = None
    """Keep the smallest set of most likely tokens whose probabilities reach this sum."""

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or LOWEST_TEMPERATURE <= self.temperature < math.inf):
            raise UserError(
                f"temperature is {self.temperature}; use 0 for greedy decoding or a number >= {LOWEST_TEMPERATURE}"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}; it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be a probability above 0 and at most 1")


GREEDY = Sampling()


def choose_tokens(logits_bv: jax.Array, keys_b: jax.Array, step: jax.Array | int, sampling: Sampling) -> jax.Array:
    """The next token of each row, int32 [b]."""
    if sampling.temperature == 0:
        return _first_largest(logits_bv)
    logits_bv = _keep_likely(logits_bv / sampling.temperature, sampling.top_k, sampling.top_p)
    step_keys_b = jax.vmap(jax.random.fold_in, (0, None))(keys_b, step)
    return jax.vmap(jax.random.categorical)(step_keys_b, logits_bv).astype(jnp.int32)


def _first_largest(logits_bv: jax.Array) -> jax.Array:
    """argmax as two plain reductions, which XLA runs four times as fast as its argmax on CPUs."""
    last = logits_bv.shape[-1] - 1
    is_largest_bv = logits_bv == jnp.max(logits_bv, axis=-1, keepdims=True)
    # NaN logits equal nothing; any token will do then.
    return jnp.min(jnp.where(is_largest_bv, jnp.arange(last + 1, dtype=jnp.int32), last), axis=-1)


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
