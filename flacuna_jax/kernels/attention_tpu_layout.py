"""The layout of attention on a TPU: padding, blocks, and the block of each step of the grid."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from flacuna_jax.kernels.packed_mask import TileRange, key_tiles, query_tiles
from flacuna_jax.kernels.tiles import TpuTile

LANES = 128
Ref = Any


class Sizes(NamedTuple):
    """Sizes of one call, in elements and in tiles, and conversions to and from the padded layout."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    dim: int
    tile: TpuTile
    window: int | None

    @staticmethod
    def of(q_bthd: jax.Array, k_bthd: jax.Array, tile: TpuTile, window: int | None) -> "Sizes":
        """Halves tiles until they divide the row, rounded up to lanes."""
        batch, length, heads, dim = q_bthd.shape
        padded = pl.cdiv(length, LANES) * LANES
        fitted = TpuTile(math.gcd(tile.queries, padded), math.gcd(tile.keys, padded))
        return Sizes(batch, length, heads, k_bthd.shape[2], dim, fitted, window)

    @property
    def padded_length(self) -> int:
        return pl.cdiv(self.length, LANES) * LANES

    @property
    def padded_dim(self) -> int:
        return pl.cdiv(self.dim, LANES) * LANES

    @property
    def group(self) -> int:
        """Query heads per key head."""
        return self.heads // self.kv_heads

    @property
    def query_tiles(self) -> int:
        return self.padded_length // self.tile.queries

    @property
    def key_tiles(self) -> int:
        return self.padded_length // self.tile.keys

    @property
    def key_steps(self) -> int:
        """Key tiles that a query tile may need."""
        return self._steps(self.tile.queries, self.tile.keys)

    @property
    def query_steps(self) -> int:
        """Query tiles that may need a key tile."""
        return self._steps(self.tile.keys, self.tile.queries)

    def _steps(self, own: int, other: int) -> int:
        everything = self.padded_length // other
        if self.window is None:
            return everything
        return min(everything, pl.cdiv(own + self.window - 2, other) + 1)

    def matrix(self, heads: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.batch, self.padded_length, heads * self.padded_dim), dtype)

    def statistic(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.batch, self.heads, 1, self.padded_length), jnp.float32)

    def pad(self, x_bthd: jax.Array) -> jax.Array:
        """[B, T, H, D] to [B, padded T, H x padded D]; without a copy if nothing is padded."""
        tail, lanes = self.padded_length - self.length, self.padded_dim - self.dim
        padded = jnp.pad(x_bthd, ((0, 0), (0, tail), (0, 0), (0, lanes)))
        return padded.reshape(self.batch, self.padded_length, -1)

    def unpad(self, x_btf: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        x_bthd = x_btf.reshape(self.batch, self.padded_length, shape[2], self.padded_dim)
        return x_bthd[:, : self.length, :, : self.dim]

    def pad_statistic(self, x_bht: jax.Array) -> jax.Array:
        return jnp.pad(x_bht, ((0, 0), (0, 0), (0, self.padded_length - self.length)))[:, :, None, :]

    def pad_mask(self, x_bt: jax.Array, beyond: int) -> jax.Array:
        tail = self.padded_length - self.length
        return jnp.pad(x_bt, ((0, 0), (0, tail)), constant_values=beyond)[:, None, :]


def key_ranges(start_b1t: jax.Array, sizes: Sizes) -> jax.Array:
    """int32 [B x query tiles x 4]: the range of key tiles of each query tile."""
    tiled = (sizes.batch, sizes.query_tiles, sizes.tile.queries)
    query_nq = jnp.arange(sizes.padded_length, dtype=jnp.int32).reshape(tiled[1:])
    return _flat(key_tiles(start_b1t.reshape(tiled), query_nq, sizes.tile.keys))


def query_ranges(end_b1t: jax.Array, sizes: Sizes) -> jax.Array:
    """int32 [B x key tiles x 4]: the range of query tiles of each key tile."""
    tiled = (sizes.batch, sizes.key_tiles, sizes.tile.keys)
    key_nk = jnp.arange(sizes.padded_length, dtype=jnp.int32).reshape(tiled[1:])
    return _flat(query_tiles(end_b1t.reshape(tiled), key_nk, sizes.tile.queries))


def _flat(ranges: TileRange) -> jax.Array:
    return jnp.stack(ranges, axis=-1).reshape(-1)


def read_range(ranges_ref: Ref, index: jax.Array) -> TileRange:
    return TileRange(*(ranges_ref[4 * index + part] for part in range(4)))


def tile_at(ranges_ref: Ref, index: jax.Array, step: jax.Array) -> jax.Array:
    """The tile of a step of a range; steps after its end keep the last tile."""
    tiles = read_range(ranges_ref, index)
    return jnp.minimum(tiles.first + step, jnp.maximum(tiles.stop - 1, 0))


def query_major_specs(sizes: Sizes) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """Blocks of q (and o, do, dq), of k and v, of the mask, and of statistics, on the grid (b, h, i, step)."""
    tile, group = sizes.tile, sizes.group

    def keys(b: Any, h: Any, i: Any, step: Any, ranges_ref: Ref) -> tuple[Any, ...]:
        return b, tile_at(ranges_ref, b * sizes.query_tiles + i, step), lax.div(h, group)

    return (
        pl.BlockSpec((None, tile.queries, sizes.padded_dim), lambda b, h, i, step, ranges: (b, i, h)),
        pl.BlockSpec((None, tile.keys, sizes.padded_dim), keys),
        pl.BlockSpec((None, 1, tile.queries), lambda b, h, i, step, ranges: (b, 0, i)),
        pl.BlockSpec((None, None, 1, tile.queries), lambda b, h, i, step, ranges: (b, h, 0, i)),
    )


def key_major_specs(sizes: Sizes) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """The same on the grid (b, key head, j, g, step), g counting the query heads that read the key head."""
    tile, group = sizes.tile, sizes.group

    def query_tile(b: Any, j: Any, step: Any, ranges_ref: Ref) -> jax.Array:
        return tile_at(ranges_ref, b * sizes.key_tiles + j, step)

    return (
        pl.BlockSpec(
            (None, tile.queries, sizes.padded_dim),
            lambda b, n, j, g, step, ranges: (b, query_tile(b, j, step, ranges), n * group + g),
        ),
        pl.BlockSpec((None, tile.keys, sizes.padded_dim), lambda b, n, j, g, step, ranges: (b, j, n)),
        pl.BlockSpec((None, 1, tile.keys), lambda b, n, j, g, step, ranges: (b, 0, j)),
        pl.BlockSpec(
            (None, None, 1, tile.queries),
            lambda b, n, j, g, step, ranges: (b, n * group + g, 0, query_tile(b, j, step, ranges)),
        ),
    )
