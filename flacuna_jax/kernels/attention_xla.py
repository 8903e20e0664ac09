"""Packed causal attention in plain XLA, tile by tile: the backend for CPUs (see `attention` for its interface).

It loops over the key tiles that a tile of queries needs, with trip counts from the mask, so that neither other
documents nor the future are computed and no [T, T] array exists. On two CPU cores at [2, 1280, 8, 64] float32 and
documents of 200 tokens, forward and backward take 12 and 44 ms, while the dense definition takes 777 and 1,835 ms (with
one document per row: 27 and 97 against 248 and 803 ms for a single row).

The loops are serial. That suits a CPU, whose cores share each product, but leaves an accelerator mostly idle. There,
this backend is for checking kernels, not for training.

Suffixes: b rows, i query tiles, n key heads, r the queries of a tile times the query heads that share a key head,
k the keys of a tile, d head_dim.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from flacuna_jax.kernels.packed_mask import PackedMask, key_tiles
from flacuna_jax.kernels.products import on_cpu, rows_as_columns
from flacuna_jax.kernels.softcap import capped, through_cap

TILE = 64
"""Queries and keys per tile. 64 and 128 are equally fast for long documents; for short ones, 64 takes 0.7 times as
long."""
LOOP_SCOPE = "key_tiles"
"""Name scope of the loops over key tiles, whose trip count depends on the mask; the planner recognizes them by it."""
LN_2 = math.log(2)
BEYOND = 2**30
"""Start of a query past the end of the row: no key is ever visible to it."""


def forward(
    q_bthd: jax.Array,
    k_bthd: jax.Array,
    v_bthd: jax.Array,
    mask: PackedMask,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, D] in q's dtype and lse [B, H, T] float32, both 0 at padding."""
    tiling = _Tiling.of(q_bthd, k_bthd)
    start_bit, first_bi, stop_bi = _ranges(mask, tiling)

    def row(_: None, of_row: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        q_inrd, k_ntd, v_ntd, start_it, first_i, stop_i = of_row

        def query_tile(_: None, of_tile: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, jax.Array]]:
            i, q_nrd, start_t, first, stop = of_tile

            def visit(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                o_nrd, top_nr1, sum_nr1 = carry
                score_nrk = capped(scale * _dot(q_nrd, tiling.keys(k_ntd, j), (2, 2)), softcap)
                score_nrk = jnp.where(tiling.visible(start_t, i, j), score_nrk, -jnp.inf)
                new_top_nr1 = jnp.maximum(top_nr1, jnp.max(score_nrk, axis=2, keepdims=True))
                against_nr1 = jnp.where(new_top_nr1 == -jnp.inf, 0.0, new_top_nr1)  # no key seen yet
                weight_nrk = jnp.exp(score_nrk - against_nr1)
                shrink_nr1 = jnp.exp(top_nr1 - against_nr1)
                v_nkd = tiling.keys(v_ntd, j)
                o_nrd = o_nrd * shrink_nr1 + _dot(weight_nrk.astype(v_nkd.dtype), v_nkd, (2, 1))
                return o_nrd, new_top_nr1, sum_nr1 * shrink_nr1 + jnp.sum(weight_nrk, axis=2, keepdims=True)

            zero_nr1 = jnp.zeros((*q_nrd.shape[:2], 1), jnp.float32)
            nothing = (jnp.zeros(q_nrd.shape, jnp.float32), zero_nr1 - jnp.inf, zero_nr1)
            with jax.named_scope(LOOP_SCOPE):
                o_nrd, top_nr1, sum_nr1 = lax.fori_loop(first, stop, visit, nothing)
            sees_any_nr1 = sum_nr1 > 0
            sum_nr1 = jnp.where(sees_any_nr1, sum_nr1, 1.0)
            lse_nr1 = jnp.where(sees_any_nr1, top_nr1 + jnp.log(sum_nr1), 0.0) / LN_2
            return None, ((o_nrd / sum_nr1).astype(q_bthd.dtype), lse_nr1)

        return lax.scan(query_tile, None, (jnp.arange(tiling.tiles), q_inrd, start_it, first_i, stop_i))

    rows = (tiling.split(q_bthd), tiling.head_major(k_bthd), tiling.head_major(v_bthd), start_bit, first_bi, stop_bi)
    _, (o_binrd, lse_binr1) = lax.scan(row, None, rows)
    return tiling.join(o_binrd), tiling.join(lse_binr1)[..., 0].swapaxes(1, 2)


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
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk, dv in the shapes and dtypes of q, k, v. A row's dk and dv are summed in place, tile after tile."""
    tiling = _Tiling.of(q_bthd, k_bthd)
    start_bit, first_bi, stop_bi = _ranges(mask, tiling)
    delta_bth1 = jnp.einsum("bthd,bthd->bth", o_bthd, do_bthd, preferred_element_type=jnp.float32)[..., None]
    lse_bth1 = lse_bht.swapaxes(1, 2)[..., None] * LN_2

    def row(_: None, of_row: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, ...]]:
        k_ntd, v_ntd, *of_tiles = of_row

        def query_tile(
            carry: tuple[jax.Array, jax.Array], of_tile: tuple[jax.Array, ...]
        ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            i, q_nrd, do_nrd, lse_nr1, delta_nr1, start_t, first, stop = of_tile

            def visit(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                dq_nrd, dk_ntd, dv_ntd = carry
                k_nkd = tiling.keys(k_ntd, j)
                score_nrk = capped(scale * _dot(q_nrd, k_nkd, (2, 2)), softcap)
                weight_nrk = jnp.where(tiling.visible(start_t, i, j), jnp.exp(score_nrk - lse_nr1), 0.0)
                dweight_nrk = _dot(do_nrd, tiling.keys(v_ntd, j), (2, 2))
                dscore_nrk = through_cap(scale * weight_nrk * (dweight_nrk - delta_nr1), score_nrk, softcap)
                dscore_nrk = dscore_nrk.astype(q_nrd.dtype)
                return (
                    dq_nrd + _dot(dscore_nrk, k_nkd, (2, 1)),
                    tiling.add_keys(dk_ntd, j, _sum_over_queries(dscore_nrk, q_nrd)),
                    tiling.add_keys(dv_ntd, j, _sum_over_queries(weight_nrk.astype(do_nrd.dtype), do_nrd)),
                )

            with jax.named_scope(LOOP_SCOPE):
                dq_nrd, *carry_out = lax.fori_loop(first, stop, visit, (jnp.zeros(q_nrd.shape, jnp.float32), *carry))
            return (carry_out[0], carry_out[1]), dq_nrd.astype(q_bthd.dtype)

        nothing = jnp.zeros(k_ntd.shape, jnp.float32), jnp.zeros(v_ntd.shape, jnp.float32)
        (dk_ntd, dv_ntd), dq_inrd = lax.scan(query_tile, nothing, (jnp.arange(tiling.tiles), *of_tiles))
        return None, (dq_inrd, dk_ntd.astype(k_bthd.dtype), dv_ntd.astype(v_bthd.dtype))

    per_tile = (*(tiling.split(x) for x in (q_bthd, do_bthd, lse_bth1, delta_bth1)), start_bit, first_bi, stop_bi)
    rows = (tiling.head_major(k_bthd), tiling.head_major(v_bthd), *per_tile)
    _, (dq_binrd, dk_bntd, dv_bntd) = lax.scan(row, None, rows)
    length = tiling.length
    return tiling.join(dq_binrd), dk_bntd.swapaxes(1, 2)[:, :length], dv_bntd.swapaxes(1, 2)[:, :length]


class _Tiling(NamedTuple):
    """Sizes of one call, and conversions between [B, T, H, D] and tiles."""

    length: int
    kv_heads: int
    group: int
    tile: int

    @staticmethod
    def of(q_bthd: jax.Array, k_bthd: jax.Array) -> "_Tiling":
        _, length, heads, _ = q_bthd.shape
        kv_heads = k_bthd.shape[2]
        return _Tiling(length, kv_heads, heads // kv_heads, min(TILE, length))

    @property
    def tiles(self) -> int:
        return -(-self.length // self.tile)

    def pad(self, x: jax.Array, value: int = 0) -> jax.Array:
        """Pads the second axis, T, to whole tiles."""
        widths = [(0, 0)] * x.ndim
        widths[1] = (0, self.tiles * self.tile - self.length)
        return jnp.pad(x, widths, constant_values=value)

    def split(self, x_bthd: jax.Array) -> jax.Array:
        """[B, T, H, D] to [B, i, n, r, D]."""
        batch, _, _, dim = x_bthd.shape
        x_bitngd = self.pad(x_bthd).reshape(batch, self.tiles, self.tile, self.kv_heads, self.group, dim)
        return x_bitngd.transpose(0, 1, 3, 4, 2, 5).reshape(batch, self.tiles, self.kv_heads, -1, dim)

    def join(self, x_binrd: jax.Array) -> jax.Array:
        """[B, i, n, r, D] to [B, T, H, D]."""
        batch, dim = x_binrd.shape[0], x_binrd.shape[-1]
        x_bingtd = x_binrd.reshape(batch, self.tiles, self.kv_heads, self.group, self.tile, dim)
        x_bthd = x_bingtd.transpose(0, 1, 4, 2, 3, 5).reshape(batch, self.tiles * self.tile, -1, dim)
        return x_bthd[:, : self.length]

    def head_major(self, x_btnd: jax.Array) -> jax.Array:
        return self.pad(x_btnd).swapaxes(1, 2)

    def keys(self, x_ntd: jax.Array, j: jax.Array) -> jax.Array:
        """Key tile j."""
        return lax.dynamic_slice_in_dim(x_ntd, j * self.tile, self.tile, axis=1)

    def add_keys(self, x_ntd: jax.Array, j: jax.Array, more_nkd: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(x_ntd, self.keys(x_ntd, j) + more_nkd, j * self.tile, axis=1)

    def visible(self, start_t: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        """bool [1, r, k]: whether the queries of tile i see the keys of tile j."""
        within = jnp.arange(self.tile)
        query_t1, key_k = (i * self.tile + within)[:, None], j * self.tile + within
        visible_tk = (start_t[:, None] <= key_k) & (key_k <= query_t1)
        return jnp.tile(visible_tk, (self.group, 1))[None]


def _ranges(mask: PackedMask, tiling: _Tiling) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`start` by tile [B, i, tile], and the first and stop index of each query tile's key tiles [B, i]."""
    shape = (mask.start_bt.shape[0], tiling.tiles, tiling.tile)
    start_bit = tiling.pad(mask.start_bt, BEYOND).reshape(shape)
    query_it = jnp.arange(tiling.tiles * tiling.tile, dtype=jnp.int32).reshape(shape[1:])
    needed = key_tiles(start_bit, query_it, tiling.tile)
    return start_bit, needed.first, needed.stop


def _dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Products of each head's tiles over the given axes, in float32."""
    numbers = (((contract[0],), (contract[1],)), ((0,), (0,)))
    return lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)


def _sum_over_queries(a_nrk: jax.Array, b_nrd: jax.Array) -> jax.Array:
    """[n, k, d] in float32."""
    if on_cpu() and a_nrk.dtype == jnp.bfloat16:
        return _dot(rows_as_columns(a_nrk), b_nrd, (2, 1))
    return _dot(a_nrk, b_nrd, (1, 1))
