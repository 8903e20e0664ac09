"""Products of activations with a matrix [out, in].

On CPUs, XLA has fast code for bfloat16 only where a product returns float32; one that returns bfloat16 takes about five
times as long. It has slow code for a single token, and for sums over the first axis of both operands, as in the
gradient of a matrix. In every call, it copies the second operand in the order that its innermost loop reads; for a few
tokens, this takes longer than the product, unless the second operand is the small one. So products on CPUs are written
in the forms with fast code.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from flacuna_jax.kernels.attention import ambient_device

FEW = {"float32": range(2, 65), "bfloat16": range(17, 65)}
"""Numbers of tokens for which a product with the matrix as the first operand was faster, or as fast (compare forms with
`benchmarks/products.py --matrices 40`). Products with the keys and values of caches use the
same numbers; they were measured in float32 only."""

LANES = 8
"""Tokens that XLA's product computes together; it takes longer for another number of tokens than for the next multiple,
unless there are only a few."""


def times_matrix(x_ti: jax.Array, matrix_oi: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    """x [..., tokens, in] times the transpose of a matrix, in `dtype` or that of x."""
    few, tokens = FEW.get(x_ti.dtype.name) if on_cpu() else None, x_ti.size // x_ti.shape[-1]
    if few is not None and tokens in few:
        return matrix_first(x_ti, matrix_oi).astype(dtype or x_ti.dtype)
    if few is None or x_ti.dtype == jnp.float32:
        return jnp.einsum("...i,oi->...o", x_ti, matrix_oi, preferred_element_type=dtype)
    if tokens == 1:
        return times_matrix(jnp.concatenate([x_ti, x_ti], axis=-2), matrix_oi, dtype)[..., :1, :]
    return rounded_product(x_ti, matrix_oi, jnp.dtype(dtype or x_ti.dtype))


def times_matrices(x_bti: jax.Array, matrix_boi: jax.Array) -> jax.Array:
    """x [..., tokens, in] times the transposes of matrices [..., out, in], in float32. Leading axes that the matrices
    do not have share a matrix."""
    if on_cpu() and x_bti.shape[-2] in FEW.get(x_bti.dtype.name, ()):
        product_bot = jnp.einsum("...oi,...ti->...ot", matrix_boi, x_bti, preferred_element_type=jnp.float32)
        return jnp.swapaxes(jax.lax.optimization_barrier(product_bot), -1, -2)
    return jnp.einsum("...ti,...oi->...to", x_bti, matrix_boi, preferred_element_type=jnp.float32)


def on_cpu() -> bool:
    """Whether the ambient mesh is one of CPUs."""
    return ambient_device()[1] == "cpu"


def matrix_first(x_ti: jax.Array, matrix_oi: jax.Array) -> jax.Array:
    """x times the transpose of a matrix in float32, for a few tokens on a CPU.

    Without the barrier, XLA would exchange the operands to save the transpose of the result.
    """
    rows_ti = x_ti.reshape(-1, x_ti.shape[-1])
    tokens = len(rows_ti)
    if tokens > LANES // 2:
        rows_ti = jnp.pad(rows_ti, ((0, -tokens % LANES), (0, 0)))
    product_ot = jnp.einsum("oi,ti->ot", matrix_oi, rows_ti, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(product_ot).T[:tokens].reshape(*x_ti.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rounded_product(x_ti: jax.Array, matrix_oi: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x times the transpose of a matrix, computed in float32 and rounded to `dtype`; gradients likewise."""
    return jnp.einsum("...i,oi->...o", x_ti, matrix_oi, preferred_element_type=jnp.float32).astype(dtype)


def _forward(x_ti: jax.Array, matrix_oi: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return rounded_product(x_ti, matrix_oi, dtype), (x_ti, matrix_oi)


def _backward(
    dtype: jnp.dtype, kept: tuple[jax.Array, jax.Array], cotangent_to: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x_ti, matrix_oi = kept
    cotangent_to = cotangent_to.astype(x_ti.dtype)
    of_x_ti = jnp.einsum("...o,oi->...i", cotangent_to, matrix_oi, preferred_element_type=jnp.float32)
    rows_ni, cotangent_no = (x.reshape(-1, x.shape[-1]) for x in (x_ti, cotangent_to))
    of_matrix_oi = jnp.einsum("on,ni->oi", rows_as_columns(cotangent_no), rows_ni, preferred_element_type=jnp.float32)
    return of_x_ti.astype(x_ti.dtype), of_matrix_oi.astype(matrix_oi.dtype)


rounded_product.defvjp(_forward, _backward)


def rows_as_columns(x_mn: jax.Array) -> jax.Array:
    """The transpose of the last two axes, in memory as well. XLA would otherwise only exchange the axes' names."""
    return with_layout_constraint(jnp.swapaxes(x_mn, -1, -2), Layout(tuple(range(x_mn.ndim))))
