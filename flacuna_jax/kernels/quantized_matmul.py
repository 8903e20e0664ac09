"""Products of activations with a frozen matrix in 8 bits, int8 or fp8, on matrix units that support them.

The matrix is quantised once, each output channel by its largest magnitude; activations are quantised in each call, each
token by its largest magnitude. So both scales are outside of the sum, which is a product of 8-bit numbers:

    y[t, o] = (Σ_i x8[t, i] w8[o, i]) · scale_x[t] · scale_w[o]

int8 products are summed exactly in int32, fp8 products (Micikevicius et al., 2022, arXiv:2209.05433: e4m3 forward, e5m2
for gradients) in float32. The gradient with respect to the activations is straight-through: quantisation of x counts as
the identity, and the product with the matrix is again in 8 bits, with gradients scaled token by token. The matrix has
no gradient.
"""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

Format = Literal["int8", "fp8"]

FORWARD: dict[str, DTypeLike] = {"int8": jnp.int8, "fp8": jnp.float8_e4m3fn}
BACKWARD: dict[str, DTypeLike] = {"int8": jnp.int8, "fp8": jnp.float8_e5m2}


class Quantized(NamedTuple):
    """Rows in 8 bits: values [..., rows, n] and a float32 scale per row [..., rows], which are multiplied."""

    values: jax.Array
    scale: jax.Array


def quantize_rows(x: jax.Array, dtype: DTypeLike) -> Quantized:
    """Scales each row [..., n] so that its largest magnitude becomes the largest number of `dtype`; zeros stay zeros.

    int8 is rounded to nearest (ties to even) in ±127; fp8 is rounded by its conversion.
    """
    x32 = x.astype(jnp.float32)
    magnitude = jnp.max(jnp.abs(x32), axis=-1)
    largest = 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)
    scale = jnp.where(magnitude > 0, magnitude, 1.0) / largest
    scaled = x32 / scale[..., None]
    values = jnp.round(scaled) if dtype == jnp.int8 else jnp.clip(scaled, -largest, largest)
    return Quantized(values.astype(dtype), scale)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def quantized_matmul(x_bti: jax.Array, values_oi: jax.Array, scale_o: jax.Array, fmt: Format) -> jax.Array:
    """x [b, t, in] times a quantised matrix, transposed: [b, t, out] in x's dtype.

    Args:
      x_bti: activations, float32 or bfloat16.
      values_oi: int8 or float8_e4m3fn [out, in], of `quantize_rows`.
      scale_o: float32 [out].
      fmt: the format of both.
    """
    x = quantize_rows(x_bti, FORWARD[fmt])
    sums_bto = _dot(x.values, values_oi, 1, x_bti.dtype)
    return (sums_bto * x.scale[..., None] * scale_o).astype(x_bti.dtype)


def _forward(
    x_bti: jax.Array, values_oi: jax.Array, scale_o: jax.Array, fmt: Format
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return quantized_matmul(x_bti, values_oi, scale_o, fmt), (values_oi, scale_o)


def _backward(fmt: Format, saved: tuple[jax.Array, ...], dy_bto: jax.Array) -> tuple[jax.Array | None, ...]:
    values_oi, scale_o = saved
    # The scales of channels are inside of the sum over channels, so they multiply the gradient before it is quantised.
    dy = quantize_rows(dy_bto.astype(jnp.float32) * scale_o, BACKWARD[fmt])
    if fmt == "int8":
        # GPUs sum int8 only along the fastest dimension. Without this constraint, XLA would transpose the stack of all
        # layers before the loop over layers, and keep both; with it, each layer's matrix is transposed when it is used.
        values_oi = with_layout_constraint(values_oi, Layout((0, 1)))
    sums_bti = _dot(dy.values, values_oi, 0, dy_bto.dtype)
    return (sums_bti * dy.scale[..., None]).astype(dy_bto.dtype), None, None


quantized_matmul.defvjp(_forward, _backward)


def _dot(x_btn: jax.Array, values_oi: jax.Array, contract: int, dtype: DTypeLike) -> jax.Array:
    """Sums over the last axis of x and the given one of the matrix, float32.

    fp8 products leave the matrix units in the compute dtype, which halves the memory traffic in bfloat16. Rounding
    there or after the scales gives the same error, which is far below that of fp8.
    """
    numbers = (((2,), (contract,)), ((), ()))
    sums = jnp.int32 if values_oi.dtype == jnp.int8 else dtype
    return lax.dot_general(x_btn, values_oi, numbers, preferred_element_type=sums).astype(jnp.float32)
