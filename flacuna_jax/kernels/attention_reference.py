"""Attention in plain jax.numpy: the reference for tests of the kernels."""

import jax
import jax.numpy as jnp

from flacuna_jax.kernels.packed_mask import PackedMask
from flacuna_jax.kernels.softcap import capped

MASKED_SCORE = -1e30
"""Finite, so that a row without a visible key gives no NaN in the forward pass or in the gradients."""


def visible_bqk(mask: PackedMask) -> jax.Array:
    """bool [B, T, T]: whether key k is visible to query q."""
    position_t = jnp.arange(mask.start_bt.shape[-1], dtype=jnp.int32)
    not_before_bqk = mask.start_bt[:, :, None] <= position_t
    return not_before_bqk & (position_t <= position_t[:, None])


def attention_reference(
    q_bthd: jax.Array,
    k_bthd: jax.Array,
    v_bthd: jax.Array,
    mask: PackedMask,
    *,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """softmax(capped(scale · q kᵀ, softcap)) v over the visible keys; softmax and sums in float32; padding rows
    are exactly 0.

    q [B, T, H, D]; k, v [B, T, Hkv, D] with H a multiple of Hkv: query head h reads key head h // (H / Hkv). Returns
    q's shape and dtype. Needs [B, H, T, T] float32 of memory.
    """
    batch, length, heads, dim = q_bthd.shape
    kv_heads = k_bthd.shape[2]
    q_btngd = q_bthd.reshape(batch, length, kv_heads, heads // kv_heads, dim)
    visible_b11qk = visible_bqk(mask)[:, None, None]
    scores_bngqk = scale * jnp.einsum("bqngd,bknd->bngqk", q_btngd, k_bthd, preferred_element_type=jnp.float32)
    scores_bngqk = capped(scores_bngqk, softcap)
    weights_bngqk = jax.nn.softmax(jnp.where(visible_b11qk, scores_bngqk, MASKED_SCORE), axis=-1)
    weights_bngqk = jnp.where(visible_b11qk, weights_bngqk, 0.0).astype(v_bthd.dtype)
    o_btngd = jnp.einsum("bngqk,bknd->bqngd", weights_bngqk, v_bthd, preferred_element_type=jnp.float32)
    return o_btngd.reshape(q_bthd.shape).astype(q_bthd.dtype)
