"""Attention for rows of one document each, by cuDNN through JAX's public function.

That function supports causal rows with individual lengths, and a sliding window, but not several documents in a row:
packed rows would need a dense mask, which computes all pairs of documents, or a private interface that exists only for
Hopper and whose results have not been checked here. Therefore packed rows are an error, and `auto` never selects this
backend: no measurement shows that it is faster than our own kernels, whose results are bit-identical from run to run,
which cuDNN does not promise.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from flacuna_jax.errors import UserError
from flacuna_jax.kernels.packed_mask import PackedMask

LARGEST_HEAD = 128
"""The largest head_dim that cuDNN supports on every GPU since Ampere."""
LOG2_E = math.log2(math.e)


def check(dim: int, dtype: DTypeLike, one_document: bool, platform: str, softcap: float | None) -> None:
    """Raises UserError with the reason if this backend does not support the arguments."""
    if platform not in ("gpu", "cuda"):
        raise UserError(f"attention backend cudnn runs on NVIDIA GPUs, not on {platform}; use auto")
    if not one_document:
        raise UserError(
            "attention backend cudnn needs rows of one document each (make_packed_mask(..., one_document=True)) and "
            "the same window in all layers, but windows differ or these rows may be packed; use auto"
        )
    if softcap is not None:
        raise UserError("attention backend cudnn has no soft cap of scores, which this model needs; use auto")
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        raise UserError(f"attention backend cudnn supports bfloat16 and float16, not {jnp.dtype(dtype).name}; use auto")
    if dim % 8 or dim > LARGEST_HEAD:
        raise UserError(
            f"attention backend cudnn supports head_dim up to {LARGEST_HEAD} in multiples of 8, not {dim}; use auto"
        )


def forward(
    q_bthd: jax.Array, k_bthd: jax.Array, v_bthd: jax.Array, mask: PackedMask, *, scale: float
) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, D] and lse [B, H, T] float32, both 0 at padding; o is NaN in rows of more than one document."""
    length_b, is_one_document_b = row_lengths(mask)
    o_bthd, pull = _run(_attend(mask, scale, length_b), q_bthd, k_bthd, v_bthd)
    (lse_bht,) = [leaf for leaf in jax.tree.leaves(pull) if _is_statistic(leaf, q_bthd)]
    live_bt = jnp.arange(q_bthd.shape[1]) < length_b[:, None]
    o_bthd = jnp.where(live_bt[:, :, None, None], o_bthd, 0)
    o_bthd = jnp.where(is_one_document_b[:, None, None, None], o_bthd, jnp.nan)
    return o_bthd, jnp.where(live_bt[:, None], lse_bht * LOG2_E, 0.0)


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
    """dq, dk, dv in the shapes and dtypes of q, k, v, 0 at padding.

    JAX exposes cuDNN's backward pass only as the derivative of the forward pass. The results of that forward pass are
    replaced by the saved ones, so the forward pass traced here is dead code and never runs.
    """
    length_b, _ = row_lengths(mask)
    live_bt11 = (jnp.arange(q_bthd.shape[1]) < length_b[:, None])[..., None, None]
    again_bthd, pull = _run(_attend(mask, scale, length_b), q_bthd, k_bthd, v_bthd)
    kept, structure = jax.tree.flatten(pull)
    at_hand = [
        o_bthd if leaf is again_bthd else lse_bht / LOG2_E if _is_statistic(leaf, q_bthd) else leaf for leaf in kept
    ]
    gradients = jax.tree.unflatten(structure, at_hand)(jnp.where(live_bt11, do_bthd, 0))
    dq_bthd, dk_bthd, dv_bthd = (jnp.where(live_bt11, gradient, 0) for gradient in gradients)
    return dq_bthd, dk_bthd, dv_bthd


def row_lengths(mask: PackedMask) -> tuple[jax.Array, jax.Array]:
    """Number of tokens of each row, int32 [B], and whether they are one document at the row's beginning, bool [B]."""
    length = mask.start_bt.shape[1]
    position_t = jnp.arange(length, dtype=jnp.int32)
    length_b = jnp.sum(mask.start_bt < length, axis=1, dtype=jnp.int32)
    first_t = jnp.zeros_like(position_t) if mask.window is None else jnp.maximum(0, position_t - (mask.window - 1))
    of_one_document_bt = jnp.where(position_t < length_b[:, None], first_t, length)
    return length_b, jnp.all(mask.start_bt == of_one_document_bt, axis=1)


def _attend(mask: PackedMask, scale: float, length_b: jax.Array) -> Callable[..., jax.Array]:
    return partial(
        jax.nn.dot_product_attention,
        is_causal=True,
        scale=scale,
        query_seq_lengths=length_b,
        key_value_seq_lengths=length_b,
        local_window_size=None if mask.window is None else (mask.window - 1, 0),
        implementation="cudnn",
    )


def _run(attend: Callable[..., jax.Array], *qkv: jax.Array) -> tuple[jax.Array, Any]:
    try:
        return jax.vjp(attend, *qkv)
    except RuntimeError as error:
        raise UserError(f"attention backend cudnn: {error} It comes with jax[cuda12] and jax[cuda13]") from error


def _is_statistic(leaf: jax.Array, q_bthd: jax.Array) -> bool:
    """Whether this is the statistic that cuDNN saves in the forward pass in addition to o: a logarithm per query."""
    batch, length, heads, _ = q_bthd.shape
    return leaf.dtype == jnp.float32 and leaf.shape == (batch, heads, length)
