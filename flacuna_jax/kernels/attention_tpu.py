"""Packed causal attention on TPUs: Pallas kernels with scalar prefetch, behind the interface in `attention`.

A TPU runs the grid in order and copies each step's blocks while the step before computes. The ranges of needed tiles
are therefore read before the kernels start: they steer which block is copied next. Steps outside a range ask for the
block that is already there, which copies nothing, and compute nothing. Sums over the innermost axes stay in scratch.

Blocks are cut out of [B, T, H x D], which is how projections leave their results, so no head is transposed; it wants D
in multiples of the 128 lanes, and other sizes are padded with zeros (the hardware would do so as well).
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flacuna_jax.kernels.packed_mask import PackedMask, TileRange, key_tiles, query_tiles
from flacuna_jax.kernels.tiles import TpuTile, TpuTiles

LANES = 128
LOG2_E = math.log2(math.e)
Ref = Any


def forward(
    q_bthd: jax.Array,
    k_bthd: jax.Array,
    v_bthd: jax.Array,
    mask: PackedMask,
    *,
    scale: float,
    tiles: TpuTiles,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, D] in q's dtype and lse [B, H, T] float32, both 0 at padding."""
    sizes = _Sizes.of(q_bthd, k_bthd, tiles.forward, mask.window)
    start_b1t = sizes.pad_mask(mask.start_bt, beyond=sizes.padded_length)
    ranges = _key_ranges(start_b1t, sizes)
    q_spec, k_spec, row_spec, statistic_spec = _query_major_specs(sizes)
    o_btf, lse_bh1t = pl.pallas_call(
        partial(packed_attention_forward, sizes=sizes, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(sizes.batch, sizes.heads, sizes.query_tiles, sizes.key_steps),
            in_specs=[q_spec, k_spec, k_spec, row_spec],
            out_specs=[q_spec, statistic_spec],
            scratch_shapes=[
                pltpu.VMEM((sizes.tile.queries, sizes.padded_dim), jnp.float32),
                pltpu.VMEM((sizes.tile.queries, 1), jnp.float32),
                pltpu.VMEM((sizes.tile.queries, 1), jnp.float32),
            ],
        ),
        out_shape=[sizes.matrix(sizes.heads, q_bthd.dtype), sizes.statistic()],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="packed_attention_forward",
    )(ranges, sizes.pad(q_bthd), sizes.pad(k_bthd), sizes.pad(v_bthd), start_b1t)
    return sizes.unpad(o_btf, q_bthd.shape), lse_bh1t[:, :, 0, : sizes.length]


def backward(
    q_bthd: jax.Array,
    k_bthd: jax.Array,
    v_bthd: jax.Array,
    mask: PackedMask,
    o_bthd: jax.Array,
    lse_bht: jax.Array,
    do_bthd: jax.Array,
    *,
    scale: float,
    tiles: TpuTiles,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk, dv in the shapes and dtypes of q, k, v."""
    delta_bht = jnp.einsum("bthd,bthd->bht", o_bthd, do_bthd, preferred_element_type=jnp.float32)
    args = (q_bthd, k_bthd, v_bthd, mask, lse_bht, delta_bht, do_bthd)
    dq_bthd = _backward_queries(*args, scale=scale, tile=tiles.dq, interpret=interpret)
    dk_bthd, dv_bthd = _backward_keys(*args, scale=scale, tile=tiles.dkv, interpret=interpret)
    return dq_bthd, dk_bthd, dv_bthd


def _backward_queries(
    q_bthd: jax.Array,
    k_bthd: jax.Array,
    v_bthd: jax.Array,
    mask: PackedMask,
    lse_bht: jax.Array,
    delta_bht: jax.Array,
    do_bthd: jax.Array,
    *,
    scale: float,
    tile: TpuTile,
    interpret: bool,
) -> jax.Array:
    sizes = _Sizes.of(q_bthd, k_bthd, tile, mask.window)
    start_b1t = sizes.pad_mask(mask.start_bt, beyond=sizes.padded_length)
    q_spec, k_spec, row_spec, statistic_spec = _query_major_specs(sizes)
    dq_btf = pl.pallas_call(
        partial(packed_attention_dq, sizes=sizes, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(sizes.batch, sizes.heads, sizes.query_tiles, sizes.key_steps),
            in_specs=[q_spec, k_spec, k_spec, row_spec, q_spec, statistic_spec, statistic_spec],
            out_specs=q_spec,
            scratch_shapes=[pltpu.VMEM((sizes.tile.queries, sizes.padded_dim), jnp.float32)],
        ),
        out_shape=sizes.matrix(sizes.heads, q_bthd.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name="packed_attention_dq",
    )(
        _key_ranges(start_b1t, sizes),
        *(sizes.pad(x_bthd) for x_bthd in (q_bthd, k_bthd, v_bthd)),
        start_b1t,
        sizes.pad(do_bthd),
        sizes.pad_statistic(lse_bht),
        sizes.pad_statistic(delta_bht),
    )
    return sizes.unpad(dq_btf, q_bthd.shape)


def _backward_keys(
    q_bthd: jax.Array,
    k_bthd: jax.Array,
    v_bthd: jax.Array,
    mask: PackedMask,
    lse_bht: jax.Array,
    delta_bht: jax.Array,
    do_bthd: jax.Array,
    *,
    scale: float,
    tile: TpuTile,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    sizes = _Sizes.of(q_bthd, k_bthd, tile, mask.window)
    end_b1t = sizes.pad_mask(mask.end_bt, beyond=0)
    q_spec, k_spec, row_spec, statistic_spec = _key_major_specs(sizes)
    dk_btf, dv_btf = pl.pallas_call(
        partial(packed_attention_dkv, sizes=sizes, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(sizes.batch, sizes.kv_heads, sizes.key_tiles, sizes.group, sizes.query_steps),
            in_specs=[q_spec, k_spec, k_spec, row_spec, q_spec, statistic_spec, statistic_spec],
            out_specs=[k_spec, k_spec],
            scratch_shapes=[pltpu.VMEM((sizes.tile.keys, sizes.padded_dim), jnp.float32)] * 2,
        ),
        out_shape=[sizes.matrix(sizes.kv_heads, k_bthd.dtype), sizes.matrix(sizes.kv_heads, v_bthd.dtype)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary", "arbitrary")
        ),
        interpret=interpret,
        name="packed_attention_dkv",
    )(
        _query_ranges(end_b1t, sizes),
        *(sizes.pad(x_bthd) for x_bthd in (q_bthd, k_bthd, v_bthd)),
        end_b1t,
        sizes.pad(do_bthd),
        sizes.pad_statistic(lse_bht),
        sizes.pad_statistic(delta_bht),
    )
    return sizes.unpad(dk_btf, k_bthd.shape), sizes.unpad(dv_btf, v_bthd.shape)


class _Sizes(NamedTuple):
    """Sizes of one call, in elements and in tiles, and the way to and from the padded layout."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    dim: int
    tile: TpuTile
    window: int | None

    @staticmethod
    def of(q_bthd: jax.Array, k_bthd: jax.Array, tile: TpuTile, window: int | None) -> "_Sizes":
        """Tiles that do not divide the row, rounded up to lanes, are halved until they do."""
        batch, length, heads, dim = q_bthd.shape
        padded = pl.cdiv(length, LANES) * LANES
        fitted = TpuTile(math.gcd(tile.queries, padded), math.gcd(tile.keys, padded))
        return _Sizes(batch, length, heads, k_bthd.shape[2], dim, fitted, window)

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
        """[B, T, H, D] to [B, padded T, H x padded D]; no copy where nothing is padded."""
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


def _key_ranges(start_b1t: jax.Array, sizes: _Sizes) -> jax.Array:
    """int32 [B x query tiles x 4]: the range of key tiles of each query tile."""
    tiled = (sizes.batch, sizes.query_tiles, sizes.tile.queries)
    query_nq = jnp.arange(sizes.padded_length, dtype=jnp.int32).reshape(tiled[1:])
    return _flat(key_tiles(start_b1t.reshape(tiled), query_nq, sizes.tile.keys))


def _query_ranges(end_b1t: jax.Array, sizes: _Sizes) -> jax.Array:
    """int32 [B x key tiles x 4]: the range of query tiles of each key tile."""
    tiled = (sizes.batch, sizes.key_tiles, sizes.tile.keys)
    key_nk = jnp.arange(sizes.padded_length, dtype=jnp.int32).reshape(tiled[1:])
    return _flat(query_tiles(end_b1t.reshape(tiled), key_nk, sizes.tile.queries))


def _flat(ranges: TileRange) -> jax.Array:
    return jnp.stack(ranges, axis=-1).reshape(-1)


def _read_range(ranges_ref: Ref, index: jax.Array) -> TileRange:
    return TileRange(*(ranges_ref[4 * index + part] for part in range(4)))


def _tile_at(ranges_ref: Ref, index: jax.Array, step: jax.Array) -> jax.Array:
    """The tile of a step of a range; after its end the last one stays."""
    tiles = _read_range(ranges_ref, index)
    return jnp.minimum(tiles.first + step, jnp.maximum(tiles.stop - 1, 0))


def _query_major_specs(sizes: _Sizes) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """Blocks of q (and o, do, dq), of k and v, of the mask, and of statistics, on the grid (b, h, i, step)."""
    tile, group = sizes.tile, sizes.group

    def keys(b: Any, h: Any, i: Any, step: Any, ranges_ref: Ref) -> tuple[Any, ...]:
        return b, _tile_at(ranges_ref, b * sizes.query_tiles + i, step), lax.div(h, group)

    return (
        pl.BlockSpec((None, tile.queries, sizes.padded_dim), lambda b, h, i, step, ranges: (b, i, h)),
        pl.BlockSpec((None, tile.keys, sizes.padded_dim), keys),
        pl.BlockSpec((None, 1, tile.queries), lambda b, h, i, step, ranges: (b, 0, i)),
        pl.BlockSpec((None, None, 1, tile.queries), lambda b, h, i, step, ranges: (b, h, 0, i)),
    )


def _key_major_specs(sizes: _Sizes) -> tuple[pl.BlockSpec, pl.BlockSpec, pl.BlockSpec, pl.BlockSpec]:
    """The same on the grid (b, key head, j, g, step), g counting the query heads that read the key head."""
    tile, group = sizes.tile, sizes.group

    def query_tile(b: Any, j: Any, step: Any, ranges_ref: Ref) -> jax.Array:
        return _tile_at(ranges_ref, b * sizes.key_tiles + j, step)

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


def packed_attention_forward(
    ranges_ref: Ref,
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    start_ref: Ref,
    o_ref: Ref,
    lse_ref: Ref,
    acc_ref: Ref,
    top_ref: Ref,
    sum_ref: Ref,
    *,
    sizes: _Sizes,
    scale: float,
) -> None:
    """Step (b, h, i, step): one key tile's part in the output of query tile i of head h."""
    tile, log2_scale = sizes.tile, scale * LOG2_E
    i, step = pl.program_id(2), pl.program_id(3)
    needed = _read_range(ranges_ref, pl.program_id(0) * sizes.query_tiles + i)
    j = needed.first + step
    query_q1 = _positions(i * tile.queries, (tile.queries, 1), axis=0)

    @pl.when(step == 0)
    def _() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)
        top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def visit(masked: bool) -> None:
        score_qk = _dot(q_ref[...], k_ref[...], contract=(1, 1))
        if masked:
            key_1k = _positions(j * tile.keys, (1, tile.keys), axis=1)
            score_qk = jnp.where((_column(start_ref) <= key_1k) & (key_1k <= query_q1), score_qk, -jnp.inf)
        top_q1 = jnp.maximum(top_ref[...], jnp.max(score_qk, axis=1, keepdims=True))
        # A row that has seen no key yet has a top of -inf, and inf - inf is no number: let it weigh against 0.
        against_q1 = jnp.where(top_q1 == -jnp.inf, 0.0, top_q1)
        weight_qk = jnp.exp2(score_qk * log2_scale - against_q1 * log2_scale)
        shrink_q1 = jnp.exp2((top_ref[...] - against_q1) * log2_scale)
        sum_ref[...] = sum_ref[...] * shrink_q1 + jnp.sum(weight_qk, axis=1, keepdims=True)
        acc_ref[...] = acc_ref[...] * shrink_q1 + _dot(weight_qk.astype(v_ref.dtype), v_ref[...], contract=(1, 0))
        top_ref[...] = top_q1

    _visit(j, needed, visit)

    @pl.when(step == sizes.key_steps - 1)
    def _() -> None:
        sees_any_q1 = _column(start_ref) <= query_q1
        sum_q1 = jnp.where(sees_any_q1, sum_ref[...], 1.0)
        o_ref[...] = jnp.where(sees_any_q1, acc_ref[...] / sum_q1, 0.0).astype(o_ref.dtype)
        lse_q1 = jnp.where(sees_any_q1, top_ref[...] * log2_scale + jnp.log2(sum_q1), 0.0)
        lse_ref[...] = lse_q1.reshape(1, tile.queries)


def packed_attention_dq(
    ranges_ref: Ref,
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    start_ref: Ref,
    do_ref: Ref,
    lse_ref: Ref,
    delta_ref: Ref,
    dq_ref: Ref,
    acc_ref: Ref,
    *,
    sizes: _Sizes,
    scale: float,
) -> None:
    """Step (b, h, i, step): one key tile's part in dq of query tile i of head h."""
    tile = sizes.tile
    i, step = pl.program_id(2), pl.program_id(3)
    needed = _read_range(ranges_ref, pl.program_id(0) * sizes.query_tiles + i)
    j = needed.first + step
    query_q1 = _positions(i * tile.queries, (tile.queries, 1), axis=0)

    @pl.when(step == 0)
    def _() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def visit(masked: bool) -> None:
        k_kd = k_ref[...]
        weight_qk = jnp.exp2(_dot(q_ref[...], k_kd, contract=(1, 1)) * (scale * LOG2_E) - _column(lse_ref))
        if masked:
            key_1k = _positions(j * tile.keys, (1, tile.keys), axis=1)
            weight_qk = jnp.where((_column(start_ref) <= key_1k) & (key_1k <= query_q1), weight_qk, 0.0)
        dweight_qk = _dot(do_ref[...], v_ref[...], contract=(1, 1))
        dscore_qk = weight_qk * (dweight_qk - _column(delta_ref))
        acc_ref[...] += _dot(dscore_qk.astype(k_kd.dtype), k_kd, contract=(1, 0))

    _visit(j, needed, visit)

    @pl.when(step == sizes.key_steps - 1)
    def _() -> None:
        sees_any_q1 = _column(start_ref) <= query_q1
        dq_ref[...] = jnp.where(sees_any_q1, acc_ref[...] * scale, 0.0).astype(dq_ref.dtype)


def packed_attention_dkv(
    ranges_ref: Ref,
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    end_ref: Ref,
    do_ref: Ref,
    lse_ref: Ref,
    delta_ref: Ref,
    dk_ref: Ref,
    dv_ref: Ref,
    dk_acc_ref: Ref,
    dv_acc_ref: Ref,
    *,
    sizes: _Sizes,
    scale: float,
) -> None:
    """Step (b, n, j, g, step): one query tile's part in dk and dv of key tile j of key head n."""
    tile = sizes.tile
    j, g, step = pl.program_id(2), pl.program_id(3), pl.program_id(4)
    needed = _read_range(ranges_ref, pl.program_id(0) * sizes.key_tiles + j)
    i = needed.first + step
    key_k1 = _positions(j * tile.keys, (tile.keys, 1), axis=0)

    @pl.when((g == 0) & (step == 0))
    def _() -> None:
        dk_acc_ref[...] = jnp.zeros_like(dk_acc_ref)
        dv_acc_ref[...] = jnp.zeros_like(dv_acc_ref)

    def visit(masked: bool) -> None:
        q_qd, do_qd = q_ref[...], do_ref[...]
        weight_kq = jnp.exp2(_dot(k_ref[...], q_qd, contract=(1, 1)) * (scale * LOG2_E) - lse_ref[...])
        if masked:
            query_1q = _positions(i * tile.queries, (1, tile.queries), axis=1)
            weight_kq = jnp.where((key_k1 <= query_1q) & (query_1q < _column(end_ref)), weight_kq, 0.0)
        dv_acc_ref[...] += _dot(weight_kq.astype(do_qd.dtype), do_qd, contract=(1, 0))
        dscore_kq = weight_kq * (_dot(v_ref[...], do_qd, contract=(1, 1)) - delta_ref[...])
        dk_acc_ref[...] += _dot(dscore_kq.astype(q_qd.dtype), q_qd, contract=(1, 0))

    _visit(i, needed, visit)

    @pl.when((g == sizes.group - 1) & (step == sizes.query_steps - 1))
    def _() -> None:
        seen_k1 = key_k1 < _column(end_ref)
        dk_ref[...] = jnp.where(seen_k1, dk_acc_ref[...] * scale, 0.0).astype(dk_ref.dtype)
        dv_ref[...] = jnp.where(seen_k1, dv_acc_ref[...], 0.0).astype(dv_ref.dtype)


def _visit(tile: jax.Array, needed: TileRange, visit: Any) -> None:
    """Computes a needed tile, with the mask where it is not full."""
    is_needed = tile < needed.stop
    is_full = (needed.full_first <= tile) & (tile < needed.full_stop)
    pl.when(is_needed & is_full)(partial(visit, masked=False))
    pl.when(is_needed & jnp.logical_not(is_full))(partial(visit, masked=True))


def _positions(first: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
    return first + lax.broadcasted_iota(jnp.int32, shape, axis)


def _column(row_ref: Ref) -> jax.Array:
    """A [1, n] block as [n, 1]."""
    return row_ref[...].reshape(row_ref.shape[1], 1)


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product of two tiles over the given axes, in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    numbers = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)
