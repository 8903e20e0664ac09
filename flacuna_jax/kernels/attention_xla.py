"""Packed causal attention as XLA compiles it anywhere, with the interface of a backend (see `attention`)."""

import math

import jax
import jax.numpy as jnp

from flacuna_jax.kernels.attention_reference import MASKED_SCORE, visible_bqk
from flacuna_jax.kernels.packed_mask import PackedMask

LOG2_E = math.log2(math.e)


def forward(
    q_bthd: jax.Array, k_bthd: jax.Array, v_bthd: jax.Array, mask: PackedMask, *, scale: float
) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, D] and lse [B, H, T]; needs [B, H, T, T] float32 of memory."""
    score_bngqk = _scores(q_bthd, k_bthd, mask, scale)
    top_bngq1 = jnp.max(score_bngqk, axis=-1, keepdims=True)
    weight_bngqk = jnp.where(score_bngqk == MASKED_SCORE, 0.0, jnp.exp2(score_bngqk - top_bngq1))
    sum_bngq1 = jnp.sum(weight_bngqk, axis=-1, keepdims=True)
    sees_any_bngq1 = sum_bngq1 > 0
    sum_bngq1 = jnp.where(sees_any_bngq1, sum_bngq1, 1.0)
    o_bqngd = jnp.einsum(
        "bngqk,bknd->bqngd",
        (weight_bngqk / sum_bngq1).astype(v_bthd.dtype),
        v_bthd,
        preferred_element_type=jnp.float32,
    )
    lse_bngq = jnp.where(sees_any_bngq1, top_bngq1 + jnp.log2(sum_bngq1), 0.0)[..., 0]
    batch, length, heads, _ = q_bthd.shape
    return o_bqngd.reshape(q_bthd.shape).astype(q_bthd.dtype), lse_bngq.reshape(batch, heads, length)


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
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk, dv."""
    q_bqngd, do_bqngd = _grouped(q_bthd, k_bthd), _grouped(do_bthd, k_bthd)
    batch, length, kv_heads, group, _ = q_bqngd.shape
    lse_bngq1 = lse_bht.reshape(batch, kv_heads, group, length, 1)
    score_bngqk = _scores(q_bthd, k_bthd, mask, scale)
    weight_bngqk = jnp.where(score_bngqk == MASKED_SCORE, 0.0, jnp.exp2(score_bngqk - lse_bngq1))
    dv_bknd = jnp.einsum(
        "bngqk,bqngd->bknd", weight_bngqk.astype(do_bthd.dtype), do_bqngd, preferred_element_type=jnp.float32
    )
    dweight_bngqk = jnp.einsum("bqngd,bknd->bngqk", do_bqngd, v_bthd, preferred_element_type=jnp.float32)
    delta_bngq = jnp.einsum("bqngd,bqngd->bngq", _grouped(o_bthd, k_bthd), do_bqngd, preferred_element_type=jnp.float32)
    dscore_bngqk = (scale * weight_bngqk * (dweight_bngqk - delta_bngq[..., None])).astype(q_bthd.dtype)
    dq_bqngd = jnp.einsum("bngqk,bknd->bqngd", dscore_bngqk, k_bthd, preferred_element_type=jnp.float32)
    dk_bknd = jnp.einsum("bngqk,bqngd->bknd", dscore_bngqk, q_bqngd, preferred_element_type=jnp.float32)
    return (
        dq_bqngd.reshape(q_bthd.shape).astype(q_bthd.dtype),
        dk_bknd.astype(k_bthd.dtype),
        dv_bknd.astype(v_bthd.dtype),
    )


def _scores(q_bthd: jax.Array, k_bthd: jax.Array, mask: PackedMask, scale: float) -> jax.Array:
    """float32 [B, Hkv, group, T, T] for exp2, MASKED_SCORE where invisible."""
    score_bngqk = jnp.einsum("bqngd,bknd->bngqk", _grouped(q_bthd, k_bthd), k_bthd, preferred_element_type=jnp.float32)
    return jnp.where(visible_bqk(mask)[:, None, None], score_bngqk * (scale * LOG2_E), MASKED_SCORE)


def _grouped(x_bthd: jax.Array, k_bthd: jax.Array) -> jax.Array:
    """Query heads by the key head that they read: [B, T, Hkv, H / Hkv, D]."""
    batch, length, heads, dim = x_bthd.shape
    kv_heads = k_bthd.shape[2]
    return x_bthd.reshape(batch, length, kv_heads, heads // kv_heads, dim)
