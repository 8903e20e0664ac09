"""8-bit products against exact ones, their gradients, and tests that the compilers really multiply in 8 bits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from flacuna_jax.kernels.quantized_matmul import BACKWARD, FORWARD, quantize_rows, quantized_matmul
from flacuna_jax.planning.targets import CompilerMissing, absent_devices, parse_target

# A rounding step is 1/127 of the largest of a row in int8; 1/16 (e4m3) and 1/8 (e5m2) of the number itself in fp8.
# Errors of many products partly cancel: these are the observed errors for these data plus a third. Gradients contain
# the channels' scales, which differ by factors here, so the largest of a row is farther from the others.
OUTPUT_ERROR = {"int8": 0.015, "fp8": 0.05}
GRADIENT_ERROR = {"int8": 0.03, "fp8": 0.07}


def data(seed=0, tokens=(2, 48), into=256, out=192):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((*tokens, into)) * rng.lognormal(0, 1, (*tokens, 1))
    w = rng.standard_normal((out, into)) * rng.lognormal(0, 1, (out, 1))
    return jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)


def relative(found, wanted):
    return float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))


@pytest.mark.parametrize("fmt", ["int8", "fp8"])
def test_products_and_gradients_are_close_to_exact_ones(fmt):
    x, w = data()
    values, scale = quantize_rows(w, FORWARD[fmt])
    y, pull = jax.vjp(lambda x: quantized_matmul(x, values, scale, fmt), x)
    dy = jnp.asarray(np.random.default_rng(1).standard_normal(y.shape), jnp.float32)
    assert relative(y, x @ w.T) < OUTPUT_ERROR[fmt]
    assert relative(pull(dy)[0], dy @ w) < GRADIENT_ERROR[fmt]


@pytest.mark.parametrize("fmt", ["int8", "fp8"])
def test_numbers_representable_in_8_bits_are_exact(fmt):
    """Whole numbers up to 8, each row with the format's largest: every scale is 1 and nothing is rounded."""
    rng = np.random.default_rng(2)

    def rows(shape, largest):
        matrix = rng.integers(-8, 9, shape).astype(np.float32)
        matrix[..., 0] = largest
        return jnp.asarray(matrix)

    largest = {"int8": 127.0, "fp8": 448.0}[fmt]
    x, w = rows((1, 5, 32), largest), rows((7, 32), largest)
    values, scale = quantize_rows(w, FORWARD[fmt])
    np.testing.assert_array_equal(scale, 1.0)
    np.testing.assert_array_equal(quantized_matmul(x, values, scale, fmt), x @ w.T)


@pytest.mark.parametrize("fmt", ["int8", "fp8"])
def test_zero_rows_and_dtypes(fmt):
    x, w = data()
    x, w = x.at[0, 3].set(0).astype(jnp.bfloat16), w.at[5].set(0)
    values, scale = quantize_rows(w, FORWARD[fmt])
    assert values.dtype == FORWARD[fmt]
    y, pull = jax.vjp(lambda x: quantized_matmul(x, values, scale, fmt), x)
    (dx,) = pull(y)
    assert y.dtype == dx.dtype == jnp.bfloat16
    assert not np.any(y[0, 3])
    assert not np.any(y[..., 5])
    assert np.isfinite(np.asarray(dx, np.float32)).all()


@pytest.mark.parametrize("dtype", [FORWARD["int8"], FORWARD["fp8"], BACKWARD["fp8"]])
def test_a_tokens_numbers_do_not_depend_on_its_neighbours(dtype):
    """Packed documents do not affect each other: each row has its own scale."""
    x, _ = data()
    alone, together = quantize_rows(x[:1, :1], dtype), quantize_rows(x * 1.0, dtype)
    np.testing.assert_array_equal(alone.values[0, 0].astype(np.float32), together.values[0, 0].astype(np.float32))
    assert alone.scale[0, 0] == together.scale[0, 0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "fmt"), [("h100", "int8"), ("h100", "fp8"), ("v5e", "int8"), ("v6e", "int8")], ids=lambda value: value
)
def test_compiled_products_are_of_8_bits(target, fmt):
    try:
        device = absent_devices(parse_target(target))[0]
    except CompilerMissing as missing:
        pytest.skip(str(missing))
    here = SingleDeviceSharding(device)

    def shaped(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    def both(x, values, scale, dy):
        y, pull = jax.vjp(lambda x: quantized_matmul(x, values, scale, fmt), x)
        return y, pull(dy)

    lowered = jax.jit(both).lower(
        shaped((2, 1280, 5120), jnp.bfloat16),
        shaped((13824, 5120), FORWARD[fmt]),
        shaped((13824,), jnp.float32),
        shaped((2, 1280, 13824), jnp.bfloat16),
    )
    forward, backward = (HLO_NAMES[dtype] for dtype in (FORWARD[fmt], BACKWARD[fmt]))
    assert set(operand_types(lowered.compile().as_text())) == {(forward, forward), (backward, forward)}


HLO_NAMES = {jnp.int8: "s8", jnp.float8_e4m3fn: "f8e4m3fn", jnp.float8_e5m2: "f8e5m2"}


def operand_types(text):
    """The operand types of every product in a compiled program."""
    types = {}
    for line in text.splitlines():
        if found := re.match(r"\s+(?:ROOT )?(%\S+) = (\w+)\[", line):
            types[found[1]] = found[2]
        if product := re.search(r" (?:dot|convolution)\((%[^,\s]+), (%[^,)\s]+)\)", line):
            yield types[product[1]], types[product[2]]
