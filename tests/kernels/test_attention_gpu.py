"""The GPU kernels in Pallas' interpreter: the arithmetic is that of the hardware, the order of programs is not."""

from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from flacuna_jax.kernels import attention_gpu
from flacuna_jax.kernels.packed_mask import make_packed_mask
from flacuna_jax.kernels.tiles import GpuTile, GpuTiles
from tests.kernels import packings

ROWS, LENGTH, HEADS, KV_HEADS, DIM = 8, 90, 2, 1, 16
"""The shape of most tests, so that they share a compilation; the last tiles of a row are incomplete."""


@cache
def kernels(dim: int = DIM, queries: int = 32, keys: int = 16) -> Any:
    """(q, k, v, do, mask) -> (o, dq, dk, dv); dk and dv with the transposed tile."""
    tile, turned = GpuTile(queries, keys, 4, 1), GpuTile(keys, queries, 4, 1)
    return packings.results_of(
        attention_gpu.forward,
        attention_gpu.backward,
        scale=dim**-0.5,
        tiles=GpuTiles(tile, tile, turned),
        interpret=True,
    )


def segments(seed: int, rows: int = ROWS, length: int = LENGTH) -> np.ndarray:
    return packings.random_segments(np.random.default_rng(seed), rows, length)


def test_random_packings_agree_with_the_definition() -> None:
    for seed in range(25):
        arrays = packings.inputs(seed, ROWS, LENGTH, HEADS, KV_HEADS, DIM)
        packings.assert_float32_exact(kernels(), arrays, make_packed_mask(jnp.array(segments(seed))))


def test_sliding_window() -> None:
    arrays = packings.inputs(0, ROWS, LENGTH, HEADS, KV_HEADS, DIM)
    packings.assert_float32_exact(kernels(), arrays, make_packed_mask(jnp.array(segments(1)), window=13))


@pytest.mark.parametrize("dim", [24, 96, *(pytest.param(dim, marks=pytest.mark.slow) for dim in (64, 80, 128))])
def test_head_sizes(dim: int) -> None:
    arrays = packings.inputs(0, 2, 64, 2, 2, dim)
    packings.assert_float32_exact(kernels(dim), arrays, make_packed_mask(jnp.array(segments(dim, 2, 64))))


def test_bfloat16_is_as_accurate_as_xla() -> None:
    arrays = packings.inputs(0, 4, 256, HEADS, KV_HEADS, 64, jnp.bfloat16)
    packings.assert_bfloat16_close(kernels(64), arrays, make_packed_mask(jnp.array(segments(4, 4, 256))))


def test_documents_are_isolated_bit_for_bit() -> None:
    rows = segments(5)
    arrays = packings.inputs(0, ROWS, LENGTH, HEADS, KV_HEADS, DIM)
    packings.assert_isolated(kernels(), arrays, rows, make_packed_mask(jnp.array(rows)))


def test_padding_is_exactly_zero_and_finite() -> None:
    rows = segments(6)
    rows[0], rows[1], rows[1, :5] = 0, 1, 0  # only padding; padding before a long document
    arrays = packings.inputs(0, ROWS, LENGTH, HEADS, KV_HEADS, DIM)
    huge = tuple(jnp.where((rows == 0)[..., None, None], x * 1e6, x) for x in arrays)
    packings.assert_padding_is_zero(kernels(), huge, rows, make_packed_mask(jnp.array(rows)))


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 13])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1)])
@pytest.mark.parametrize(("queries", "keys"), [(16, 16), (64, 16), (16, 64), (64, 32), (128, 64)])
@pytest.mark.parametrize("length", [1, 63, 160])
def test_more_packings_and_tilings(
    length: int, queries: int, keys: int, heads: int, kv_heads: int, window: int | None
) -> None:
    results = kernels(DIM, queries, keys)
    for seed in range(4):
        arrays = packings.inputs(seed, ROWS, length, heads, kv_heads, DIM)
        mask = make_packed_mask(jnp.array(segments(seed, ROWS, length)), window)
        packings.assert_float32_exact(results, arrays, mask)
