"""Packed causal attention on NVIDIA GPUs: Pallas kernels through Triton.

The algorithm is FlashAttention-2 (Dao, 2023): scores exist one tile at a time, the forward pass saves o and a
log-sum-exp per query, and the backward pass recomputes the scores. There are two differences. Each program derives from
the mask's intervals which tiles of the other axis it needs, so tiles of other documents are never loaded. And the
backward pass has two kernels, one with programs for queries (dq) and one with programs for keys (dk, dv), so that
nothing is accumulated through memory and results are bit-identical from run to run.

This is the only module that depends on the Triton lowering of Pallas.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from flacuna_jax.kernels.packed_mask import PackedMask, TileRange, key_tiles, query_tiles
from flacuna_jax.kernels.softcap import capped, through_cap
from flacuna_jax.kernels.tiles import GpuTile, GpuTiles

LOG2_E = math.log2(math.e)
BEYOND = 2**30
"""Start of a query past the end of the row: no key is ever visible to it."""

Ref = Any
Index = jax.Array | int


def forward(
    q_bthd: jax.Array,
    k_bthd: jax.Array,
    v_bthd: jax.Array,
    mask: PackedMask,
    *,
    scale: float,
    softcap: float | None = None,
    tiles: GpuTiles,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Output o [B, T, H, D] in q's dtype, and lse [B, H, T] float32: log2 Σ exp2(log2(e) score). Both 0 at padding.

    Arguments as in `attention.attention`, for any T and D.
    """
    tile = tiles.forward
    batch, length, heads, dim = q_bthd.shape
    plan = _Plan(tile, length, dim, scale, softcap, interpret)
    specs = _Specs(plan)
    q_spec, k_spec = specs.head(), specs.head(shared_by=heads // k_bthd.shape[2])
    return pl.pallas_call(
        partial(packed_attention_forward, plan=plan),
        grid=(pl.cdiv(length, tile.queries), batch, heads),
        in_specs=[q_spec, k_spec, k_spec, specs.row()],
        out_specs=[q_spec, specs.statistic()],
        out_shape=[
            jax.ShapeDtypeStruct(q_bthd.shape, q_bthd.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
    )(q_bthd, k_bthd, v_bthd, mask.start_bt)


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
    tiles: GpuTiles,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v in their shapes and dtypes, from the forward pass's results and the gradient of o."""
    batch, length, heads, dim = q_bthd.shape
    kv_heads = k_bthd.shape[2]
    group = heads // kv_heads
    statistics = jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)

    tile = tiles.dq
    plan = _Plan(tile, length, dim, scale, softcap, interpret)
    specs = _Specs(plan)
    q_spec, k_spec = specs.head(), specs.head(shared_by=group)
    dq_bthd, delta_bht = pl.pallas_call(
        partial(packed_attention_dq, plan=plan),
        grid=(pl.cdiv(length, tile.queries), batch, heads),
        in_specs=[q_spec, k_spec, k_spec, specs.row(), q_spec, q_spec, specs.statistic()],
        out_specs=[q_spec, specs.statistic()],
        out_shape=[jax.ShapeDtypeStruct(q_bthd.shape, q_bthd.dtype), statistics],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
    )(q_bthd, k_bthd, v_bthd, mask.start_bt, o_bthd, do_bthd, lse_bht)

    tile = tiles.dkv_for(length)
    plan = _Plan(tile, length, dim, scale, softcap, interpret)
    specs = _Specs(plan)
    q_spec, k_spec = specs.head_group(group), specs.head()
    statistic_spec = specs.statistic_group(group)
    dk_bthd, dv_bthd = pl.pallas_call(
        partial(packed_attention_dkv, plan=plan),
        grid=(pl.cdiv(length, tile.keys), batch, kv_heads),
        in_specs=[q_spec, k_spec, k_spec, specs.row(), q_spec, statistic_spec, statistic_spec],
        out_specs=[k_spec, k_spec],
        out_shape=[
            jax.ShapeDtypeStruct(k_bthd.shape, k_bthd.dtype),
            jax.ShapeDtypeStruct(v_bthd.shape, v_bthd.dtype),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
    )(q_bthd, k_bthd, v_bthd, mask.end_bt, do_bthd, lse_bht, delta_bht)
    return dq_bthd, dk_bthd, dv_bthd


@dataclass(frozen=True)
class _Plan:
    """The static arguments of a kernel."""

    tile: GpuTile
    length: int
    dim: int
    scale: float
    softcap: float | None
    interpret: bool

    @property
    def padded_dim(self) -> int:
        """Triton needs powers of two, and at least 16 in a product."""
        return max(16, pl.next_power_of_2(self.dim))

    @property
    def padded_length(self) -> int:
        largest = max(self.tile.queries, self.tile.keys)
        return pl.cdiv(self.length, largest) * largest

    @property
    def log2_scale(self) -> float:
        """Of the results of `scores`, for exp2."""
        return LOG2_E if self.softcap is not None else self.scale * LOG2_E

    def scores(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Products of queries and keys in float32: with a cap scaled and capped, otherwise not yet scaled."""
        product = self.dot(a, b, contract=(1, 1))
        return product if self.softcap is None else capped(product * self.scale, self.softcap)

    def load(self, ref: Ref, first: Index, size: int, head: Index | None = None) -> jax.Array:
        """[size, padded D] from position `first` of a [T, padded D] or, with `head`, [T, heads, padded D] reference."""
        rows = pl.ds(first, size)
        at = ref.at[rows, :] if head is None else ref.at[rows, head, :]
        return _load(at, self._inside(first, size), 0.0)

    def store(self, ref: Ref, first: Index, x_td: jax.Array) -> None:
        size = x_td.shape[0]
        plgpu.store(ref.at[pl.ds(first, size), :], x_td.astype(ref.dtype), mask=self._inside(first, size))

    def load_vector(self, ref: Ref, first: Index, size: int, head: Index | None = None, other: float = 0) -> jax.Array:
        """[size] from position `first` of a [T] or, with `head`, [heads, T] reference; `other` beyond the row's end."""
        rows = pl.ds(first, size)
        return _load(ref.at[rows] if head is None else ref.at[head, rows], self._inside_row(first, size), other)

    def store_vector(self, ref: Ref, first: Index, x_t: jax.Array) -> None:
        size = x_t.shape[0]
        plgpu.store(ref.at[pl.ds(first, size)], x_t, mask=self._inside_row(first, size))

    def _inside_row(self, first: Index, size: int) -> jax.Array | None:
        """The guard for positions inside of the row; None if the tiles divide the row, because guards cost time."""
        ragged = self.length % self.tile.queries or self.length % self.tile.keys
        return first + jnp.arange(size) < self.length if ragged else None

    def _inside(self, first: Index, size: int) -> jax.Array | None:
        row_t = self._inside_row(first, size)
        if row_t is None and self.dim == self.padded_dim:
            return None
        column_d = jnp.arange(self.padded_dim) < self.dim
        if row_t is None:
            return jnp.broadcast_to(column_d[None, :], (size, self.padded_dim))
        return row_t[:, None] & column_d[None, :]

    def dot(self, a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
        """Product of two tiles over the given axes, in float32.

        float32 operands are split into three TF32 products, which have float32's precision and run on tensor cores;
        plain float32 products do not fit into the registers. The interpreter uses plain products.
        """
        precision: Any = None
        if a.dtype == jnp.float32:
            precision = lax.Precision.HIGHEST if self.interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        numbers = (((contract[0],), (contract[1],)), ((), ()))
        return lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)


def _load(ref: Ref, inside: jax.Array | None, other: float) -> jax.Array:
    return ref[...] if inside is None else plgpu.load(ref, mask=inside, other=other)


class _Specs:
    """Block specifications for a program (tile, batch row, head): whole rows of its head, from which it loads tiles."""

    def __init__(self, plan: _Plan) -> None:
        self.length, self.dim = plan.padded_length, plan.padded_dim

    def head(self, shared_by: int = 1) -> pl.BlockSpec:
        """[T, D] of the program's head, or of the key head that `shared_by` query heads read."""
        return pl.BlockSpec((None, self.length, None, self.dim), lambda t, b, h: (b, 0, lax.div(h, shared_by), 0))

    def head_group(self, group: int) -> pl.BlockSpec:
        """[T, group, D]: the query heads that read the program's key head."""
        return pl.BlockSpec((None, self.length, group, self.dim), lambda t, b, h: (b, 0, h, 0))

    def row(self) -> pl.BlockSpec:
        """[T] of the mask."""
        return pl.BlockSpec((None, self.length), lambda t, b, h: (b, 0))

    def statistic(self) -> pl.BlockSpec:
        """[T] of the program's head."""
        return pl.BlockSpec((None, None, self.length), lambda t, b, h: (b, h, 0))

    def statistic_group(self, group: int) -> pl.BlockSpec:
        """[group, T]: of the query heads that read the program's key head."""
        return pl.BlockSpec((None, group, self.length), lambda t, b, h: (b, h, 0))


def packed_attention_forward(
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    start_ref: Ref,
    o_ref: Ref,
    lse_ref: Ref,
    *,
    plan: _Plan,
) -> None:
    """Program (i, b, h): output and statistics of query tile i."""
    tile, log2_scale = plan.tile, plan.log2_scale
    first_query = pl.program_id(0) * tile.queries
    query_q = first_query + jnp.arange(tile.queries)
    start_q = plan.load_vector(start_ref, first_query, tile.queries, other=BEYOND)
    q_qd = plan.load(q_ref, first_query, tile.queries)

    def visit(j: jax.Array, carry: tuple[jax.Array, ...], masked: bool) -> tuple[jax.Array, ...]:
        o_qd, top_q, sum_q = carry
        first_key = j * tile.keys
        score_qk = plan.scores(q_qd, plan.load(k_ref, first_key, tile.keys))
        if masked:
            key_k = first_key + jnp.arange(tile.keys)
            visible_qk = (start_q[:, None] <= key_k[None, :]) & (key_k[None, :] <= query_q[:, None])
            score_qk = jnp.where(visible_qk, score_qk, -jnp.inf)
        new_top_q = jnp.maximum(top_q, jnp.max(score_qk, axis=1))
        # A row without a visible key so far has a maximum of -inf, and inf - inf is NaN; use 0 instead.
        against_q = jnp.where(new_top_q == -jnp.inf, 0.0, new_top_q)
        weight_qk = jnp.exp2(score_qk * log2_scale - (against_q * log2_scale)[:, None])
        shrink_q = jnp.exp2((top_q - against_q) * log2_scale)
        v_kd = plan.load(v_ref, first_key, tile.keys)
        o_qd = o_qd * shrink_q[:, None] + plan.dot(weight_qk.astype(v_kd.dtype), v_kd, contract=(1, 0))
        return o_qd, new_top_q, sum_q * shrink_q + jnp.sum(weight_qk, axis=1)

    nothing = (
        jnp.zeros(q_qd.shape, jnp.float32),
        jnp.full(query_q.shape, -jnp.inf, jnp.float32),
        jnp.zeros(query_q.shape, jnp.float32),
    )
    o_qd, top_q, sum_q = _walk(key_tiles(start_q, query_q, tile.keys), visit, nothing)
    sees_any_q = start_q <= query_q
    sum_q = jnp.where(sees_any_q, sum_q, 1.0)
    plan.store(o_ref, first_query, jnp.where(sees_any_q[:, None], o_qd / sum_q[:, None], 0.0))
    plan.store_vector(lse_ref, first_query, jnp.where(sees_any_q, top_q * log2_scale + jnp.log2(sum_q), 0.0))


def packed_attention_dq(
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    start_ref: Ref,
    o_ref: Ref,
    do_ref: Ref,
    lse_ref: Ref,
    dq_ref: Ref,
    delta_ref: Ref,
    *,
    plan: _Plan,
) -> None:
    """Program (i, b, h): dq of query tile i, and delta = Σ_d o·do, which the kernel for keys also needs."""
    tile, log2_scale = plan.tile, plan.log2_scale
    first_query = pl.program_id(0) * tile.queries
    query_q = first_query + jnp.arange(tile.queries)
    start_q = plan.load_vector(start_ref, first_query, tile.queries, other=BEYOND)
    lse_q = plan.load_vector(lse_ref, first_query, tile.queries)
    q_qd = plan.load(q_ref, first_query, tile.queries)
    do_qd = plan.load(do_ref, first_query, tile.queries)
    o_qd = plan.load(o_ref, first_query, tile.queries)
    delta_q = jnp.sum(o_qd.astype(jnp.float32) * do_qd.astype(jnp.float32), axis=1)
    plan.store_vector(delta_ref, first_query, delta_q)

    def visit(j: jax.Array, dq_qd: jax.Array, masked: bool) -> jax.Array:
        first_key = j * tile.keys
        k_kd = plan.load(k_ref, first_key, tile.keys)
        score_qk = plan.scores(q_qd, k_kd)
        weight_qk = jnp.exp2(score_qk * log2_scale - lse_q[:, None])
        if masked:
            key_k = first_key + jnp.arange(tile.keys)
            visible_qk = (start_q[:, None] <= key_k[None, :]) & (key_k[None, :] <= query_q[:, None])
            weight_qk = jnp.where(visible_qk, weight_qk, 0.0)
        dweight_qk = plan.dot(do_qd, plan.load(v_ref, first_key, tile.keys), contract=(1, 1))
        dscore_qk = through_cap(weight_qk * (dweight_qk - delta_q[:, None]), score_qk, plan.softcap)
        return dq_qd + plan.dot(dscore_qk.astype(k_kd.dtype), k_kd, contract=(1, 0))

    dq_qd = _walk(key_tiles(start_q, query_q, tile.keys), visit, jnp.zeros(q_qd.shape, jnp.float32))
    sees_any_q = start_q <= query_q
    plan.store(dq_ref, first_query, jnp.where(sees_any_q[:, None], dq_qd * plan.scale, 0.0))


def packed_attention_dkv(
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    end_ref: Ref,
    do_ref: Ref,
    lse_ref: Ref,
    delta_ref: Ref,
    dk_ref: Ref,
    dv_ref: Ref,
    *,
    plan: _Plan,
) -> None:
    """Program (j, b, h): dk and dv of key tile j of key head h, summed over the query heads that read it."""
    tile, log2_scale = plan.tile, plan.log2_scale
    first_key = pl.program_id(0) * tile.keys
    key_k = first_key + jnp.arange(tile.keys)
    end_k = plan.load_vector(end_ref, first_key, tile.keys)
    k_kd = plan.load(k_ref, first_key, tile.keys)
    v_kd = plan.load(v_ref, first_key, tile.keys)
    readers = query_tiles(end_k, key_k, tile.queries)

    def of_head(head: Index, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        def visit(i: jax.Array, carry: tuple[jax.Array, jax.Array], masked: bool) -> tuple[jax.Array, jax.Array]:
            dk_kd, dv_kd = carry
            first_query = i * tile.queries
            q_qd = plan.load(q_ref, first_query, tile.queries, head)
            lse_q = plan.load_vector(lse_ref, first_query, tile.queries, head)
            score_kq = plan.scores(k_kd, q_qd)
            weight_kq = jnp.exp2(score_kq * log2_scale - lse_q[None, :])
            if masked:
                query_q = first_query + jnp.arange(tile.queries)
                visible_kq = (key_k[:, None] <= query_q[None, :]) & (query_q[None, :] < end_k[:, None])
                weight_kq = jnp.where(visible_kq, weight_kq, 0.0)
            do_qd = plan.load(do_ref, first_query, tile.queries, head)
            dv_kd = dv_kd + plan.dot(weight_kq.astype(do_qd.dtype), do_qd, contract=(1, 0))
            delta_q = plan.load_vector(delta_ref, first_query, tile.queries, head)
            dscore_kq = weight_kq * (plan.dot(v_kd, do_qd, contract=(1, 1)) - delta_q[None, :])
            dscore_kq = through_cap(dscore_kq, score_kq, plan.softcap)
            dk_kd = dk_kd + plan.dot(dscore_kq.astype(q_qd.dtype), q_qd, contract=(1, 0))
            return dk_kd, dv_kd

        return _walk(readers, visit, carry)

    nothing = jnp.zeros(k_kd.shape, jnp.float32), jnp.zeros(v_kd.shape, jnp.float32)
    group = q_ref.shape[1]
    dk_kd, dv_kd = of_head(jnp.int32(0), nothing) if group == 1 else lax.fori_loop(0, group, of_head, nothing)
    seen_k = key_k < end_k
    plan.store(dk_ref, first_key, jnp.where(seen_k[:, None], dk_kd * plan.scale, 0.0))
    plan.store(dv_ref, first_key, jnp.where(seen_k[:, None], dv_kd, 0.0))


def _walk(tiles: TileRange, visit: Callable[..., Any], carry: Any) -> Any:
    """Visits the tiles in order; only partly visible tiles apply the mask."""
    carry = lax.fori_loop(tiles.first, tiles.full_first, partial(visit, masked=True), carry)
    carry = lax.fori_loop(tiles.full_first, tiles.full_stop, partial(visit, masked=False), carry)
    return lax.fori_loop(tiles.full_stop, tiles.stop, partial(visit, masked=True), carry)
