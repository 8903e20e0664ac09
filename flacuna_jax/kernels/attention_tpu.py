"""Packed causal attention on TPUs: Pallas kernels with scalar prefetch, behind the interface in `attention`.

A TPU runs the grid in order and copies each step's blocks while the previous step computes. The ranges of needed tiles
are therefore computed before the kernels start, and select the block to copy next. Steps outside of a range request the
block that is already loaded, which copies nothing, and compute nothing. Sums over the innermost axes stay in scratch.

Blocks are slices of [B, T, H x D], the layout of the projections' outputs, so no head is transposed. D must be a
multiple of the 128 lanes; other sizes are padded with zeros (the hardware would do the same).
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from flacuna_jax.kernels.attention_tpu_layout import (
    LANES,
    Ref,
    Sizes,
    key_major_specs,
    key_ranges,
    query_major_specs,
    query_ranges,
    read_range,
)
from flacuna_jax.kernels.packed_mask import PackedMask, TileRange
from flacuna_jax.kernels.softcap import capped, through_cap
from flacuna_jax.kernels.tiles import TpuTile, TpuTiles

LOG2_E = math.log2(math.e)


def forward(
    q_bthd: jax.Array,
    k_bthd: jax.Array,
    v_bthd: jax.Array,
    mask: PackedMask,
    *,
    scale: float,
    softcap: float | None = None,
    tiles: TpuTiles,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, D] in q's dtype and lse [B, H, T] float32, both 0 at padding."""
    sizes = Sizes.of(q_bthd, k_bthd, tiles.forward, mask.window)
    start_b1t = sizes.pad_mask(mask.start_bt, beyond=sizes.padded_length)
    ranges = key_ranges(start_b1t, sizes)
    q_spec, k_spec, row_spec, statistic_spec = query_major_specs(sizes)
    o_btf, lse_bh1t = pl.pallas_call(
        partial(packed_attention_forward, sizes=sizes, scale=scale, softcap=softcap),
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
    softcap: float | None = None,
    tiles: TpuTiles,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk, dv in the shapes and dtypes of q, k, v."""
    delta_bht = jnp.einsum("bthd,bthd->bht", o_bthd, do_bthd, preferred_element_type=jnp.float32)
    args = (q_bthd, k_bthd, v_bthd, mask, lse_bht, delta_bht, do_bthd)
    dq_bthd = _backward_queries(*args, scale=scale, softcap=softcap, tile=tiles.dq, interpret=interpret)
    dk_bthd, dv_bthd = _backward_keys(*args, scale=scale, softcap=softcap, tile=tiles.dkv, interpret=interpret)
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
    softcap: float | None,
    tile: TpuTile,
    interpret: bool,
) -> jax.Array:
    sizes = Sizes.of(q_bthd, k_bthd, tile, mask.window)
    start_b1t = sizes.pad_mask(mask.start_bt, beyond=sizes.padded_length)
    q_spec, k_spec, row_spec, statistic_spec = query_major_specs(sizes)
    dq_btf = pl.pallas_call(
        partial(packed_attention_dq, sizes=sizes, scale=scale, softcap=softcap),
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
        key_ranges(start_b1t, sizes),
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
    softcap: float | None,
    tile: TpuTile,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    sizes = Sizes.of(q_bthd, k_bthd, tile, mask.window)
    end_b1t = sizes.pad_mask(mask.end_bt, beyond=0)
    q_spec, k_spec, row_spec, statistic_spec = key_major_specs(sizes)
    dk_btf, dv_btf = pl.pallas_call(
        partial(packed_attention_dkv, sizes=sizes, scale=scale, softcap=softcap),
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
        query_ranges(end_b1t, sizes),
        *(sizes.pad(x_bthd) for x_bthd in (q_bthd, k_bthd, v_bthd)),
        end_b1t,
        sizes.pad(do_bthd),
        sizes.pad_statistic(lse_bht),
        sizes.pad_statistic(delta_bht),
    )
    return sizes.unpad(dk_btf, k_bthd.shape), sizes.unpad(dv_btf, v_bthd.shape)


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
    sizes: Sizes,
    scale: float,
    softcap: float | None,
) -> None:
    """Step (b, h, i, step): the contribution of one key tile to the output of query tile i of head h."""
    tile, log2_scale = sizes.tile, _log2_scale(scale, softcap)
    i, step = pl.program_id(2), pl.program_id(3)
    needed = read_range(ranges_ref, pl.program_id(0) * sizes.query_tiles + i)
    j = needed.first + step
    query_q1 = _positions(i * tile.queries, (tile.queries, 1), axis=0)

    @pl.when(step == 0)
    def _() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)
        top_ref[...] = jnp.full_like(top_ref, -jnp.inf)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def visit(masked: bool) -> None:
        score_qk = _scores(q_ref[...], k_ref[...], scale, softcap)
        if masked:
            key_1k = _positions(j * tile.keys, (1, tile.keys), axis=1)
            score_qk = jnp.where((_column(start_ref) <= key_1k) & (key_1k <= query_q1), score_qk, -jnp.inf)
        top_q1 = jnp.maximum(top_ref[...], jnp.max(score_qk, axis=1, keepdims=True))
        # A row without a visible key so far has a maximum of -inf, and inf - inf is NaN; use 0 instead.
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
        lse_ref[...] = jnp.broadcast_to(lse_q1, (tile.queries, LANES)).T[:1]


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
    sizes: Sizes,
    scale: float,
    softcap: float | None,
) -> None:
    """Step (b, h, i, step): the contribution of one key tile to dq of query tile i of head h."""
    tile = sizes.tile
    i, step = pl.program_id(2), pl.program_id(3)
    needed = read_range(ranges_ref, pl.program_id(0) * sizes.query_tiles + i)
    j = needed.first + step
    query_q1 = _positions(i * tile.queries, (tile.queries, 1), axis=0)

    @pl.when(step == 0)
    def _() -> None:
        acc_ref[...] = jnp.zeros_like(acc_ref)

    def visit(masked: bool) -> None:
        k_kd = k_ref[...]
        score_qk = _scores(q_ref[...], k_kd, scale, softcap)
        weight_qk = jnp.exp2(score_qk * _log2_scale(scale, softcap) - _column(lse_ref))
        if masked:
            key_1k = _positions(j * tile.keys, (1, tile.keys), axis=1)
            weight_qk = jnp.where((_column(start_ref) <= key_1k) & (key_1k <= query_q1), weight_qk, 0.0)
        dweight_qk = _dot(do_ref[...], v_ref[...], contract=(1, 1))
        dscore_qk = through_cap(weight_qk * (dweight_qk - _column(delta_ref)), score_qk, softcap)
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
    sizes: Sizes,
    scale: float,
    softcap: float | None,
) -> None:
    """Step (b, n, j, g, step): the contribution of one query tile to dk and dv of key tile j of key head n."""
    tile = sizes.tile
    j, g, step = pl.program_id(2), pl.program_id(3), pl.program_id(4)
    needed = read_range(ranges_ref, pl.program_id(0) * sizes.key_tiles + j)
    i = needed.first + step
    key_k1 = _positions(j * tile.keys, (tile.keys, 1), axis=0)

    @pl.when((g == 0) & (step == 0))
    def _() -> None:
        dk_acc_ref[...] = jnp.zeros_like(dk_acc_ref)
        dv_acc_ref[...] = jnp.zeros_like(dv_acc_ref)

    def visit(masked: bool) -> None:
        q_qd, do_qd = q_ref[...], do_ref[...]
        score_kq = _scores(k_ref[...], q_qd, scale, softcap)
        weight_kq = jnp.exp2(score_kq * _log2_scale(scale, softcap) - lse_ref[...])
        if masked:
            query_1q = _positions(i * tile.queries, (1, tile.queries), axis=1)
            weight_kq = jnp.where((key_k1 <= query_1q) & (query_1q < _column(end_ref)), weight_kq, 0.0)
        dv_acc_ref[...] += _dot(weight_kq.astype(do_qd.dtype), do_qd, contract=(1, 0))
        dscore_kq = weight_kq * (_dot(v_ref[...], do_qd, contract=(1, 1)) - delta_ref[...])
        dscore_kq = through_cap(dscore_kq, score_kq, softcap)
        dk_acc_ref[...] += _dot(dscore_kq.astype(q_qd.dtype), q_qd, contract=(1, 0))

    _visit(i, needed, visit)

    @pl.when((g == sizes.group - 1) & (step == sizes.query_steps - 1))
    def _() -> None:
        seen_k1 = key_k1 < _column(end_ref)
        dk_ref[...] = jnp.where(seen_k1, dk_acc_ref[...] * scale, 0.0).astype(dk_ref.dtype)
        dv_ref[...] = jnp.where(seen_k1, dv_acc_ref[...], 0.0).astype(dv_ref.dtype)


def _visit(tile: jax.Array, needed: TileRange, visit: Any) -> None:
    """Computes a needed tile, with the mask if it is only partly visible."""
    is_needed = tile < needed.stop
    is_full = (needed.full_first <= tile) & (tile < needed.full_stop)
    pl.when(is_needed & is_full)(partial(visit, masked=False))
    pl.when(is_needed & jnp.logical_not(is_full))(partial(visit, masked=True))


def _positions(first: jax.Array, shape: tuple[int, int], axis: int) -> jax.Array:
    return first + lax.broadcasted_iota(jnp.int32, shape, axis)


def _column(row_ref: Ref) -> jax.Array:
    """A [1, n] block as [n, 1], by a transpose of whole tiles, which every TPU generation supports; v4 has no other."""
    return jnp.broadcast_to(row_ref[...], (LANES, row_ref.shape[1])).T[:, :1]


def _scores(a: jax.Array, b: jax.Array, scale: float, softcap: float | None) -> jax.Array:
    """Products of queries and keys in float32: with a cap scaled and capped, otherwise not yet scaled."""
    product = _dot(a, b, contract=(1, 1))
    return product if softcap is None else capped(product * scale, softcap)


def _log2_scale(scale: float, softcap: float | None) -> float:
    """Of the results of `_scores`, for exp2."""
    return scale * LOG2_E if softcap is None else LOG2_E


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product of two tiles over the given axes, in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    numbers = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)
