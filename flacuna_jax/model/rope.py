"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864), and how it is stretched to longer inputs.

Every scaling here gives each frequency one value, whatever the length of the input: in a packed row, documents of all
lengths share their frequencies. (What transformers calls dynamic depends on the length. With the factor of the longest
input it is NTK scaling, a larger `rope_theta`; `ntk_theta` computes it.)
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How frequencies are changed, with the names of transformers' config.json."""

    kind: Literal["linear", "llama3"]
    factor: float
    """Of the context's length."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    """llama3 only, as the two before: which wavelengths are stretched, counted against the context of pre-training."""


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per position of each pair, float32 [head_dim / 2].

    linear (Chen et al., 2023, arXiv:2306.15595) divides all by the factor. llama3 (Dubey et al., 2024,
    arXiv:2407.21783) divides those whose wavelength exceeds original / low_freq_factor, leaves those below original /
    high_freq_factor alone, and goes smoothly from one to the other.
    """
    frequency = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None and scaling.kind == "linear":
        frequency = frequency / scaling.factor
    if scaling is not None and scaling.kind == "llama3":
        turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequency = kept * frequency + (1 - kept) * frequency / scaling.factor
    return frequency.astype(np.float32)


def ntk_theta(theta: float, head_dim: int, factor: float) -> float:
    """The base under which the slowest pair turns `factor` times slower and the fastest as before."""
    return theta * factor ** (head_dim / (head_dim - 2))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rope:
    """cos and sin of each position's angles, [b, t, 1, head_dim / 2] in float32."""

    cos: jax.Array
    sin: jax.Array

    @classmethod
    def at(cls, positions_bt: jax.Array, frequencies: np.ndarray) -> "Rope":
        angle = positions_bt.astype(jnp.float32)[:, :, None, None] * frequencies
        return cls(jnp.cos(angle), jnp.sin(angle))

    def rotate(self, x_bthn: jax.Array) -> jax.Array:
        x1, x2 = jnp.split(x_bthn.astype(jnp.float32), 2, axis=-1)
        rotated = jnp.concatenate([x1 * self.cos - x2 * self.sin, x2 * self.cos + x1 * self.sin], axis=-1)
        return rotated.astype(x_bthn.dtype)
