"""tokamax's kernels in Mosaic GPU's interpreter against the float32 definition, over random packings.

    python -m tests.kernels.tokamax_interpreted "NVIDIA H200"     # or "NVIDIA B200"

Needs XLA_FLAGS=--xla_force_host_platform_device_count=16 (see `test_attention_tokamax`). Minutes on two cores.
"""

import sys
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flacuna_jax.kernels import attention_tokamax
from flacuna_jax.kernels.packed_mask import make_packed_mask
from tests.kernels import packings
from tests.kernels.mosaic_interpreter import interpreted


def segments(seed: int, rows: int, length: int) -> np.ndarray:
    return packings.random_segments(np.random.default_rng(seed), rows, length)


def check(kind: str) -> None:
    @cache
    def kernels(dim: int) -> Callable[..., tuple[jax.Array, ...]]:
        return packings.results_of(
            attention_tokamax.forward, attention_tokamax.backward, scale=dim**-0.5, device_kind=kind
        )

    def inputs(seed: int, rows: int, length: int, heads: int, kv_heads: int, dim: int) -> Any:
        return packings.inputs(seed, rows, length, heads, kv_heads, dim, jnp.bfloat16)

    def close(rows: np.ndarray, heads: int, kv_heads: int, dim: int, window: int | None = None) -> None:
        mask = make_packed_mask(jnp.array(rows), window)
        packings.assert_bfloat16_close(kernels(dim), inputs(0, *rows.shape, heads, kv_heads, dim), mask)

    def report(what: str, begun: float) -> None:
        print(f"{kind}: {what}: {time.monotonic() - begun:.0f} s", flush=True)

    three_tiles = np.array([[1] * 150 + [2] * 100 + [3] * 134])
    length_200 = np.array([[1] * 200, [1] * 60 + [2] * 90 + [0] * 50])
    for what, *case in (
        *((f"packing {seed}", segments(seed, 2, 256), 2, 1, 64) for seed in range(6)),
        ("window 37", segments(11, 2, 256), 2, 1, 64, 37),
        ("three tiles, head_dim 128", three_tiles, 1, 1, 128),
        ("length 200, head_dim 96", length_200, 2, 2, 96),
    ):
        begun = time.monotonic()
        close(*case)
        report(what, begun)

    begun = time.monotonic()
    rows = segments(5, 2, 256)
    rows[0], rows[1, :70], rows[1, 70:] = 0, 0, 1  # only padding; padding at the start, beyond half a tile
    arrays = inputs(0, 2, 256, 2, 1, 64)
    huge = tuple(jnp.where((rows == 0)[..., None, None], x * 1e6, x) for x in arrays)
    packings.assert_padding_is_zero(kernels(64), huge, rows, make_packed_mask(jnp.array(rows)))
    report("padding", begun)

    begun = time.monotonic()
    rows = np.repeat([[1] * 90 + [2] * 80 + [3] * 50 + [0] * 36], 2, axis=0)
    packings.assert_isolated(kernels(64), arrays, rows, make_packed_mask(jnp.array(rows)))
    report("isolation", begun)


if __name__ == "__main__":
    with interpreted():
        check(sys.argv[1])
