from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flacuna_jax.kernels import attention_xla
from flacuna_jax.kernels.packed_mask import make_packed_mask
from tests.kernels import packings

ROWS, LENGTH, HEADS, KV_HEADS, DIM = 6, 200, 4, 2, 16
"""Rows of several tiles, the last one incomplete."""


@cache
def path(dim: int = DIM) -> Any:
    return packings.results_of(attention_xla.forward, attention_xla.backward, scale=dim**-0.5)


def segments(seed: int, rows: int = ROWS, length: int = LENGTH) -> np.ndarray:
    return packings.random_segments(np.random.default_rng(seed), rows, length)


def test_random_packings_agree_with_the_definition() -> None:
    for seed in range(20):
        arrays = packings.inputs(seed, ROWS, LENGTH, HEADS, KV_HEADS, DIM)
        packings.assert_float32_exact(path(), arrays, make_packed_mask(jnp.array(segments(seed))))


@pytest.mark.parametrize("length", [1, 7, 64, 65])
def test_lengths(length: int) -> None:
    rows = np.ones((2, length), np.int32)
    arrays = packings.inputs(length, 2, length, 2, 2, DIM)
    o, *_ = path()(*arrays, make_packed_mask(jnp.array(rows)))
    expected, *_ = packings.oracle(*arrays, make_packed_mask(jnp.array(rows)))
    assert packings.relative_error(o, expected) < packings.FLOAT32_ERROR


def test_sliding_window() -> None:
    arrays = packings.inputs(0, ROWS, LENGTH, HEADS, KV_HEADS, DIM)
    packings.assert_float32_exact(path(), arrays, make_packed_mask(jnp.array(segments(1)), window=70))


def test_bfloat16_is_as_accurate_as_the_definition_in_bfloat16() -> None:
    arrays = packings.inputs(0, 4, 256, HEADS, KV_HEADS, 64, jnp.bfloat16)
    packings.assert_bfloat16_close(path(64), arrays, make_packed_mask(jnp.array(segments(4, 4, 256))))


def test_documents_are_isolated_bit_for_bit() -> None:
    rows = segments(5)
    arrays = packings.inputs(0, ROWS, LENGTH, HEADS, KV_HEADS, DIM)
    packings.assert_isolated(path(), arrays, rows, make_packed_mask(jnp.array(rows)))


def test_padding_is_exactly_zero_and_finite() -> None:
    rows = segments(6)
    rows[0], rows[1], rows[1, :5] = 0, 1, 0  # only padding; padding before a long document
    arrays = packings.inputs(0, ROWS, LENGTH, HEADS, KV_HEADS, DIM)
    huge = tuple(jnp.where((rows == 0)[..., None, None], x * 1e6, x) for x in arrays)
    packings.assert_padding_is_zero(path(), huge, rows, make_packed_mask(jnp.array(rows)))


def test_no_array_of_squared_length_exists() -> None:
    q = jax.ShapeDtypeStruct((2, 2048, 4, 32), jnp.float32)
    mask = jax.eval_shape(make_packed_mask, jax.ShapeDtypeStruct((2, 2048), jnp.int32))
    memory = path(32).lower(q, q, q, q, mask).compile().memory_analysis()
    square = 2 * 4 * 2048 * 2048 * 4
    assert memory.temp_size_in_bytes < square / 3
