"""Rotary position embedding (Su et al., 2021, arXiv:2104.09864), and its scaling to longer inputs.

With every scaling here, the frequencies do not depend on the length of the input, because the documents of a packed row
share them. (The scaling that transformers calls dynamic depends on the length. With the factor of the longest input, it
is NTK scaling, a larger `rope_theta`; `ntk_theta` computes it.)
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """The scaling of frequencies, with the names of transformers' config.json."""

    kind: Literal["linear", "llama3", "yarn", "longrope", "dynamic"]
    factor: float
    """Ratio of the extended context length to the original one."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    """The context length of pre-training, for llama3, yarn and longrope. The two factors before are llama3's, and
    select the wavelengths to scale."""
    # yarn and longrope only; not in the repr, which identifies the base of runs that began before they existed.
    beta_fast: float = dataclasses.field(default=32.0, repr=False)
    """Pairs that turn more often than this within the original context are kept, ..."""
    beta_slow: float = dataclasses.field(default=1.0, repr=False)
    """... and pairs that turn less often than this are divided by the factor."""
    attention_factor: float = dataclasses.field(default=1.0, repr=False)
    """Multiplies cos and sin, and so the products of queries and keys by its square."""
    truncate: bool = dataclasses.field(default=True, repr=False)
    """Whether the bounds of the two ranges are rounded to whole pairs."""
    short_factor: tuple[float, ...] = dataclasses.field(default=(), repr=False)
    """Of longrope: the divisor of each pair's frequency within the original context, ..."""
    long_factor: tuple[float, ...] = dataclasses.field(default=(), repr=False)
    """... and beyond it. The latter is only read and written: longer inputs are not accepted."""


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Radians per position of each pair, float32 [head_dim / 2].

    linear (Chen et al., 2023, arXiv:2306.15595) divides all frequencies by the factor. llama3 (Dubey et al., 2024,
    arXiv:2407.21783) divides frequencies with a wavelength above original / low_freq_factor, keeps those with a
    wavelength below original / high_freq_factor, and interpolates smoothly in between. yarn (Peng et al., 2023,
    arXiv:2309.00071) does the same by the number of turns within the original context, linearly in the index of the
    pair. longrope (Ding et al., 2024, arXiv:2402.13753) divides each pair by its own factor. dynamic scales only inputs
    that are longer than the model's context, which are not accepted here.
    """
    frequency = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is not None and scaling.kind == "linear":
        frequency = frequency / scaling.factor
    if scaling is not None and scaling.kind == "llama3":
        turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequency = kept * frequency + (1 - kept) * frequency / scaling.factor
    if scaling is not None and scaling.kind == "yarn":
        kept = 1 - _yarn_ramp(head_dim, theta, scaling)
        frequency = kept * frequency + (1 - kept) * frequency / scaling.factor
    if scaling is not None and scaling.kind == "longrope":
        frequency = frequency / np.array(scaling.short_factor)
    return frequency.astype(np.float32)


def _yarn_ramp(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """From 0 for pairs that are kept to 1 for pairs that are divided by the factor, float64 [head_dim / 2]."""

    def pair(turns: float) -> float:
        """The index of the pair that turns this often within the original context."""
        wavelength = scaling.original_max_position_embeddings / turns
        return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

    first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    return np.clip((np.arange(head_dim // 2) - first) / (last - first or 0.001), 0.0, 1.0)


def ntk_theta(theta: float, head_dim: int, factor: float) -> float:
    """The base with which the slowest pair rotates `factor` times slower and the fastest pair as before."""
    return theta * factor ** (head_dim / (head_dim - 2))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rope:
    """cos and sin of each position's angles, [b, t, 1, rotated dimensions / 2] in float32."""

    cos: jax.Array
    sin: jax.Array

    @classmethod
    def at(cls, positions_bt: jax.Array, frequencies: np.ndarray, factor: float = 1.0) -> "Rope":
        """`factor` multiplies the rotated vectors."""
        angle = positions_bt.astype(jnp.float32)[:, :, None, None] * frequencies
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        return cls(cos, sin) if factor == 1 else cls(cos * factor, sin * factor)

    def unless(self, switched_off: jax.Array) -> "Rope":
        """No rotation where the bool scalar is True."""
        return Rope(jnp.where(switched_off, 1.0, self.cos), jnp.where(switched_off, 0.0, self.sin))

    def rotate(self, x_bthn: jax.Array) -> jax.Array:
        half = self.cos.shape[-1]
        x1, x2, rest = jnp.split(x_bthn.astype(jnp.float32), [half, 2 * half], axis=-1)
        rotated = jnp.concatenate([x1 * self.cos - x2 * self.sin, x2 * self.cos + x1 * self.sin, rest], axis=-1)
        return rotated.astype(x_bthn.dtype)
