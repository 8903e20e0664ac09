"""Tile sizes of the attention kernels, one table per architecture."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax.typing import DTypeLike


@dataclass(frozen=True)
class GpuTile:
    """One kernel's tile: `queries` x `keys` scores at a time, by `warps` x 32 threads, loads `stages` deep."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class GpuTiles:
    forward: GpuTile
    dq: GpuTile
    dkv: GpuTile


@dataclass(frozen=True)
class TpuTile:
    """One kernel's tile: `queries` x `keys` scores at a time, both multiples of 128."""

    queries: int
    keys: int


@dataclass(frozen=True)
class TpuTiles:
    forward: TpuTile
    dq: TpuTile
    dkv: TpuTile


def gpu_tiles(device_kind: str | None, dim: int, dtype: DTypeLike) -> GpuTiles:
    if jnp.dtype(dtype).itemsize == 4:
        t = GpuTile(32, 32, 4, 1)
        return GpuTiles(t, t, t)
    return GpuTiles(GpuTile(128, 64, 8, 2), GpuTile(64, 64, 8, 2), GpuTile(64, 64, 8, 2))


def tpu_tiles(device_kind: str | None, dim: int, dtype: DTypeLike) -> TpuTiles:
    return TpuTiles(TpuTile(256, 256), TpuTile(256, 256), TpuTile(256, 256))
