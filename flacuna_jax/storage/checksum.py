"""Checksums of arrays on their devices, independent of their sharding."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def checksums(arrays: Sequence[Any]) -> list[int]:
    """Sum of bits × (2 × position + 1) modulo 2³² of each array: exact integers, so it is the same for every sharding.
    Because the weights are odd, any change of one element changes the sum."""
    sums = jax.device_get([_partial_sums(array) for array in arrays])
    return [sum(map(int, parts)) % 2**32 for parts in sums]


def _partial_sums(array: Any) -> list[jax.Array]:
    """Processes stacked arrays one layer at a time, because a CPU needs four bytes per element for the sum."""
    array = jnp.asarray(array)
    if array.ndim < 3:
        return [_weighted_sum(array, np.uint32(0))]
    return [_weighted_sum_of_layer(array, np.uint32(layer)) for layer in range(len(array))]


@jax.jit
def _weighted_sum_of_layer(array: jax.Array, layer: jax.Array) -> jax.Array:
    return _weighted_sum(jax.lax.dynamic_index_in_dim(array, layer, keepdims=False), layer)


@jax.jit
def _weighted_sum(array: jax.Array, position: jax.Array) -> jax.Array:
    """The weighted sum of an array that is element `position` of a larger one."""
    if array.dtype.itemsize < 4:
        bits = jax.lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}").astype(jnp.uint32)
    else:
        bits = jax.lax.bitcast_convert_type(array, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)
