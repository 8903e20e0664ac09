"""Soft caps, which limit numbers smoothly to (-cap, cap): Gemma 2 has them for scores of attention and for logits.

A cap of None limits nothing, and adds nothing to a program.
"""

import jax
import jax.numpy as jnp


def capped(x: jax.Array, cap: float | None) -> jax.Array:
    """cap · tanh(x / cap)."""
    return x if cap is None else cap * jnp.tanh(x * (1 / cap))


def through_cap(gradient: jax.Array, y: jax.Array, cap: float | None) -> jax.Array:
    """The gradient of x from that of y = capped(x, cap)."""
    return gradient if cap is None else gradient * (1 - (y * (1 / cap)) ** 2)
