"""The one entry to attention."""

from typing import Literal

import jax
from jax.ad_checkpoint import checkpoint_name

from flacuna_jax.kernels.attention_reference import attention_reference
from flacuna_jax.kernels.packed_mask import PackedMask

Backend = Literal["auto", "xla"]
OUTPUT_NAME = "attention_output"
LSE_NAME = "attention_lse"
SAVED_NAMES = (OUTPUT_NAME, LSE_NAME)
"""Give these to `jax.checkpoint_policies.save_only_these_names`, and attention is not computed again."""


def attention(
    q_bthd: jax.Array,
    k_bthd: jax.Array,
    v_bthd: jax.Array,
    mask: PackedMask,
    *,
    scale: float | None = None,
    backend: Backend = "auto",
) -> jax.Array:
    """Causal attention within the documents of packed rows.

    q [B, T, H, D], k and v [B, T, Hkv, D] of one dtype (float32 or bfloat16), H a multiple of Hkv. `scale` defaults
    to D ** -0.5. Returns q's shape and dtype; padding rows are exactly 0 and receive no gradient.

    Raises ValueError where shapes or dtypes do not fit together.
    """
    del backend
    _check(q_bthd, k_bthd, v_bthd, mask)
    scale = q_bthd.shape[-1] ** -0.5 if scale is None else scale
    return checkpoint_name(attention_reference(q_bthd, k_bthd, v_bthd, mask, scale=scale), OUTPUT_NAME)


def _check(q_bthd: jax.Array, k_bthd: jax.Array, v_bthd: jax.Array, mask: PackedMask) -> None:
    batch, length, heads, dim = q_bthd.shape
    kv_heads = k_bthd.shape[2]
    if k_bthd.shape != v_bthd.shape or k_bthd.shape != (batch, length, kv_heads, dim) or heads % kv_heads:
        raise ValueError(
            f"attention needs q [B, T, H, D] and k, v [B, T, Hkv, D] with H a multiple of Hkv; "
            f"got q {q_bthd.shape}, k {k_bthd.shape}, v {v_bthd.shape}"
        )
    if mask.start_bt.shape != (batch, length):
        raise ValueError(f"the mask is for rows {mask.start_bt.shape}, the queries for {(batch, length)}")
    if not q_bthd.dtype == k_bthd.dtype == v_bthd.dtype:
        raise ValueError(f"q, k, v must share a dtype; got {q_bthd.dtype}, {k_bthd.dtype}, {v_bthd.dtype}")
