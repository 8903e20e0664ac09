"""A frozen base in fewer bits: NF4 with double quantisation, and int8. Each layer is dequantised when it is computed.

NF4 (Dettmers et al., 2023, arXiv:2305.14314) in the layout of bitsandbytes: blocks of 64 weights of a row share their
largest magnitude; the first of two neighbours is in the high half of a byte. The magnitudes minus their mean are
themselves 8-bit codes, in blocks of 256: 4.127 bits per weight. int8 (Dettmers et al., 2022, arXiv:2208.07339): a row
shares its largest magnitude; inputs are not quantised.

The modules replace the kernel of a projection. Codes are gathered over fsdp before they are dequantised, and
`dequantized` is a primitive that no remat policy saves: a backward pass dequantises again.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flacuna_jax.errors import UserError
from flacuna_jax.kernels.quantized_matmul import quantize_rows, quantized_matmul
from flacuna_jax.model.sharding import constrain
from flacuna_jax.model.variables import Axes, ModuleName, ParamInfo, QuantParam

Quantization = Literal["nf4", "int8", "int8_product", "fp8_product"]

BLOCK, GROUP = 64, 256
"""Number of weights that share a magnitude, and number of magnitudes that share a scale."""

NF4_VALUES = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
"""The paper's table (appendix E): equal shares of a normal distribution, with an exact 0."""


def _dynamic_values() -> np.ndarray:
    """The signed 8-bit table of the magnitudes (Dettmers, 2016, arXiv:1511.04561): each of seven decades below 1 has
    twice as many values as the previous one."""
    found = [0.0, 1.0]
    for decade in range(7):
        edges = _evenly(np.float32(0.1), np.float32(1), 2**decade + 1)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        found += [float(sign * np.float32(10.0 ** (decade - 6)) * mean) for mean in means for sign in (1, -1)]
    return np.sort(np.array(found, np.float32))


def _evenly(start: np.float32, end: np.float32, count: int) -> np.ndarray:
    """torch.linspace in float32, which counts from the nearer end with fused steps, because the table has its
    rounding."""
    step, index = np.float64((end - start) / np.float32(count - 1)), np.arange(count)
    return np.where(index < count // 2, start + step * index, end - step * (count - 1 - index)).astype(np.float32)


DYNAMIC_VALUES = _dynamic_values()


def _between(values: np.ndarray) -> np.ndarray:
    return (values[:-1] + values[1:]) / np.float32(2)


UNNAMED = ParamInfo(ModuleName(""), "", "matrix", (None, None))
"""Info for a kernel [out, in] outside of a network."""


class NF4Kernel(nnx.Module):
    """A kernel [out, in] in four bits.

    codes uint8 [out, in / 2]; absmax uint8 [out, in / 64], codes of the blocks' magnitudes; absmax_scale float32
    [⌈out · in / 64 / 256⌉] and absmax_offset float32 [], which dequantise the magnitudes.
    """

    def __init__(self, kernel_oi: jax.Array, info: ParamInfo = UNNAMED) -> None:
        rows, columns = kernel_oi.shape
        if columns % BLOCK:
            raise UserError(
                f"model.quantization: nf4 needs rows of a multiple of {BLOCK} weights, but a row has {columns}"
            )
        scaled, absmax = _by_magnitude(kernel_oi.astype(jnp.float32).reshape(-1, BLOCK))
        codes = _nearest(scaled, NF4_VALUES).reshape(rows, columns)
        offset = jnp.mean(absmax)
        padded = jnp.pad(absmax - offset, (0, -absmax.size % GROUP)).reshape(-1, GROUP)
        scaled_absmax, scale = _by_magnitude(padded)
        matrix = info.part("matrix", info.layer_axes)
        self.codes = QuantParam((codes[:, ::2] << 4) | codes[:, 1::2], info=matrix)
        of_blocks = _nearest(scaled_absmax, DYNAMIC_VALUES).reshape(-1)[: absmax.size]
        self.absmax = QuantParam(of_blocks.reshape(rows, columns // BLOCK), info=matrix)
        self.absmax_scale = QuantParam(scale, info=info.part("scale", (None,)))
        self.absmax_offset = QuantParam(offset, info=info.part("scale", ()))

    def dequantized(self, axes: Axes, dtype: jnp.dtype) -> jax.Array:
        """The kernel [out, in] in `dtype`, gathered along fsdp; float32 until the last rounding, as in bitsandbytes."""
        leaves = (self.codes[...], self.absmax[...], self.absmax_scale[...], self.absmax_offset[...])
        return _dequantize_nf4(axes, jnp.dtype(dtype), *leaves)


class Int8Kernel(nnx.Module):
    """A kernel [out, in] in eight bits, codes int8 [out, in] · row_absmax float32 [out] / 127."""

    def __init__(self, kernel_oi: jax.Array, info: ParamInfo = UNNAMED) -> None:
        absmax = jnp.max(jnp.abs(kernel_oi.astype(jnp.float32)), axis=-1)
        per_unit = 127.0 / jnp.maximum(absmax, 1e-30)
        codes = jnp.round(kernel_oi.astype(jnp.float32) * per_unit[:, None]).astype(jnp.int8)
        self.codes = QuantParam(codes, info=info.part("matrix", info.layer_axes))
        self.row_absmax = QuantParam(absmax, info=info.part("scale", info.layer_axes[:1]))

    def dequantized(self, axes: Axes, dtype: jnp.dtype) -> jax.Array:
        """As that of `NF4Kernel`."""
        return _dequantize_int8(axes, jnp.dtype(dtype), self.codes[...], self.row_absmax[...])


class Int8Product(Int8Kernel):
    """A kernel stored like `Int8Kernel` and multiplied in int8: activations are quantised to int8, token by token."""

    def product(self, x_bti: jax.Array, axes: Axes) -> jax.Array:
        """[batch, length, out] in x's dtype, see `kernels.quantized_matmul`."""
        scale_o = constrain(self.row_absmax[...], axes[0]) / 127
        return quantized_matmul(x_bti, constrain(self.codes[...], *axes), scale_o, "int8")


class Fp8Product(nnx.Module):
    """Like `Int8Product`, in fp8: codes float8_e4m3fn [out, in] · row_absmax float32 [out] / 448."""

    def __init__(self, kernel_oi: jax.Array, info: ParamInfo = UNNAMED) -> None:
        codes, scale = quantize_rows(kernel_oi, jnp.float8_e4m3fn)
        self.codes = QuantParam(codes, info=info.part("matrix", info.layer_axes))
        self.row_absmax = QuantParam(scale * FP8_LARGEST, info=info.part("scale", info.layer_axes[:1]))

    def dequantized(self, axes: Axes, dtype: jnp.dtype) -> jax.Array:
        """As that of `NF4Kernel`."""
        scale_o = constrain(self.row_absmax[...], axes[0]) / FP8_LARGEST
        return (constrain(self.codes[...], *axes).astype(jnp.float32) * scale_o[:, None]).astype(dtype)

    def product(self, x_bti: jax.Array, axes: Axes) -> jax.Array:
        """See `Int8Product.product`."""
        scale_o = constrain(self.row_absmax[...], axes[0]) / FP8_LARGEST
        return quantized_matmul(x_bti, constrain(self.codes[...], *axes), scale_o, "fp8")


FP8_LARGEST = float(jnp.finfo(jnp.float8_e4m3fn).max)

Kernel = NF4Kernel | Int8Kernel | Fp8Product
KERNELS: dict[Quantization, type[Kernel]] = {
    "nf4": NF4Kernel,
    "int8": Int8Kernel,
    "int8_product": Int8Product,
    "fp8_product": Fp8Product,
}


def _by_magnitude(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Blocks divided by their largest magnitude, and these magnitudes."""
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    reciprocal = 1.0 / jnp.maximum(absmax, 2e-38)  # a normal number, so that blocks of zeros stay zeros
    return jnp.clip(blocks * reciprocal[:, None], -1.0, 1.0), absmax


def _nearest(values: jax.Array, table: np.ndarray) -> jax.Array:
    """uint8 index of the nearest entry of a sorted table; halfway between two, the lower one."""
    return jnp.searchsorted(jnp.asarray(_between(table)), values, side="left").astype(jnp.uint8)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dequantize_nf4(
    axes: Axes, dtype: jnp.dtype, codes: jax.Array, absmax: jax.Array, scale: jax.Array, offset: jax.Array
) -> jax.Array:
    codes, absmax = constrain(codes, *axes), constrain(absmax, *axes)
    rows, blocks = absmax.shape
    of_groups = jnp.repeat(scale, GROUP)[: rows * blocks].reshape(rows, blocks)
    magnitudes = jnp.asarray(DYNAMIC_VALUES)[absmax] * of_groups + offset
    halves = jnp.stack([codes >> 4, codes & 15], axis=-1).reshape(rows, blocks, BLOCK)
    return (jnp.asarray(NF4_VALUES)[halves] * magnitudes[:, :, None]).astype(dtype).reshape(rows, blocks * BLOCK)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dequantize_int8(axes: Axes, dtype: jnp.dtype, codes: jax.Array, absmax: jax.Array) -> jax.Array:
    per_code = constrain(absmax, axes[0]) / 127
    return (constrain(codes, *axes).astype(jnp.float32) * per_code[:, None]).astype(dtype)


def _no_gradient(*_: object) -> tuple[jax.Array, None]:
    raise TypeError("a quantised base is frozen; it has no gradient")


# Functions with custom derivatives, so that remat policies see a single primitive.
_dequantize_nf4.defvjp(_no_gradient, _no_gradient)
_dequantize_int8.defvjp(_no_gradient, _no_gradient)
