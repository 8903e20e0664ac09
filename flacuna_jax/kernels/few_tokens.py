"""Products of a matrix with a few tokens on CPUs, as in decoding.

XLA multiplies several times as fast if the matrix [out, in] is the first operand: otherwise it transposes the matrix
for each product (bfloat16), or has slow code (a single token).
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from flacuna_jax.kernels.attention import ambient_device

FEW = 64


def times_matrix(x_bti: jax.Array, matrix_oi: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    """x times the transpose of a matrix, in `dtype` or that of x."""
    rows = math.prod(x_bti.shape[:-1])
    if ambient_device()[1] != "cpu" or rows > FEW or (rows > 1 and x_bti.dtype != jnp.bfloat16):
        return jnp.einsum("bti,oi->bto", x_bti, matrix_oi, preferred_element_type=dtype)
    x_mi = x_bti.reshape(rows, -1)
    y_om = jax.lax.dot_general(matrix_oi, x_mi, (((1,), (1,)), ((), ())), preferred_element_type=dtype)
    # Without the barrier, XLA would exchange the operands to omit the transposition of the result.
    return jax.lax.optimization_barrier(y_om).T.reshape(*x_bti.shape[:-1], -1)
