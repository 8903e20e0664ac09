"""Packed causal attention on Hopper and Blackwell data-center GPUs with tokamax's Mosaic GPU kernels.

tokamax's public function takes a dense mask or a window. Its kernels also take the first visible key of each query,
which is `PackedMask.start_bt`. They are not part of tokamax's public interface, so only the release is supported that
the tests have checked. The forward kernel skips keys before the earliest document of its queries. The backward kernels
skip only the future, and mask other documents.

No key is visible to a padding query. The forward kernels give 0 for a single padding query, but a whole tile of them
(128 queries) hangs the kernel for sm_90: the computing threads start their loop before the first loaded key, and wait
forever. Therefore each padding position sees itself, and its results are replaced by zeros.

The kernels use no atomic operations: results are bit-identical from run to run.
"""

import importlib
import math
from dataclasses import dataclass
from functools import cache, partial
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from flacuna_jax.errors import UserError
from flacuna_jax.kernels.packed_mask import PackedMask
from flacuna_jax.kernels.tiles import gpu_architecture

VERSION = "0.0.17"
"""The supported release of tokamax, whose kernels are private and change between releases."""
LARGEST_HEAD = 128
TILE = 128
"""Rows are padded to a multiple of this, so that no tile of a kernel extends past the end of the row."""
LOG2_E = math.log2(math.e)
NO_WEIGHT = 1e30
"""The logarithm of a padding query's sum in the backward pass, which makes its weights exactly 0."""


def installed() -> str | None:
    """The installed version of tokamax, if any. Imports nothing."""
    try:
        return metadata.version("tokamax")
    except metadata.PackageNotFoundError:
        return None


def misfit(
    dim: int, dtype: DTypeLike, platform: str, device_kind: str | None, softcap: float | None = None
) -> str | None:
    """The reason why this backend does not support heads of `dim` on such a device; None if it does."""
    if platform not in ("gpu", "cuda"):
        return f"runs on NVIDIA GPUs, not on {platform}"
    if gpu_architecture(device_kind) not in _CONFIGS:
        return f"has kernels for Hopper (sm_90) and Blackwell (sm_100) data-center GPUs, not for {device_kind}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"supports bfloat16 and float16, not {jnp.dtype(dtype).name}"
    if dim > LARGEST_HEAD:
        return f"supports head_dim up to {LARGEST_HEAD}, not {dim}"
    if softcap is not None:
        return "is not tested here with a soft cap of scores, which this model needs"
    found = installed()
    if found is None:
        return f"needs tokamax {VERSION}, which is not installed: pip install 'flacuna-jax[tokamax]' (Python 3.12)"
    if found != VERSION:
        return f"needs tokamax {VERSION}, but {found} is installed: pip install 'tokamax=={VERSION}'"
    return None


def check(dim: int, dtype: DTypeLike, platform: str, device_kind: str | None, softcap: float | None) -> None:
    """Raises UserError with the reason if this backend does not support the arguments."""
    if reason := misfit(dim, dtype, platform, device_kind, softcap):
        raise UserError(f"attention backend tokamax {reason}; or use auto")


def forward(
    q_bthd: jax.Array, k_bthd: jax.Array, v_bthd: jax.Array, mask: PackedMask, *, scale: float, device_kind: str | None
) -> tuple[jax.Array, jax.Array]:
    """o [B, T, H, D] in q's dtype and lse [B, H, T] float32, both 0 at padding."""
    kernels = _kernels(gpu_architecture(device_kind))
    length = q_bthd.shape[1]
    start_bt, live_bt = _visible_to_themselves(mask)
    attend = partial(
        kernels.forward,
        bias=None,
        mask=None,
        k_end=None,
        is_causal=True,
        logits_soft_cap=None,
        logits_scale=scale,
        out_dtype=q_bthd.dtype,
        normalize_output=True,
        return_residuals=True,
        use_stable_softmax=True,
        rescale_threshold=1.0,
        config=kernels.forward_config,
    )

    def row(start_t: jax.Array, *qkv_thd: jax.Array) -> Any:
        return attend(*qkv_thd, k_start=start_t[None])

    o_bthd, (top_bht, sum_bht) = jax.vmap(row)(start_bt, *(_whole_tiles(x) for x in (q_bthd, k_bthd, v_bthd)))
    o_bthd = jnp.where(live_bt[:, :, None, None], o_bthd[:, :length], 0)
    lse_bht = (top_bht * LOG2_E + jnp.log2(sum_bht))[..., :length]
    return o_bthd, jnp.where(live_bt[:, None], lse_bht, 0.0)


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
    device_kind: str | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk, dv in the shapes and dtypes of q, k, v, 0 at padding."""
    kernels = _kernels(gpu_architecture(device_kind))
    length = q_bthd.shape[1]
    start_bt, live_bt = _visible_to_themselves(mask)
    differentiate = partial(
        kernels.backward,
        bias=None,
        mask=None,
        k_end=None,
        logits_scale=scale,
        logits_soft_cap=None,
        is_causal=True,
        ds_dtype=None,
        config=kernels.backward_config,
    )

    def row(top_ht: jax.Array, start_t: jax.Array, *arrays_thd: jax.Array) -> Any:
        q_thd, k_thd, v_thd, o_thd, do_thd = arrays_thd
        # exp(score - top) / sum with the logarithm of the sum as top, and a sum of 1.
        residuals = top_ht, jnp.ones_like(top_ht)
        return differentiate(q_thd, k_thd, v_thd, residuals, o_thd, do_thd, k_start=start_t[None])

    top_bht = jnp.where(live_bt[:, None], lse_bht / LOG2_E, NO_WEIGHT)
    top_bht = jnp.pad(top_bht, ((0, 0), (0, 0), (0, -length % TILE)), constant_values=NO_WEIGHT)
    do_bthd = jnp.where(live_bt[:, :, None, None], do_bthd, 0)
    arrays = (q_bthd, k_bthd, v_bthd, o_bthd, do_bthd)
    dq_bthd, dk_bthd, dv_bthd, _ = jax.vmap(row)(top_bht, start_bt, *(_whole_tiles(x) for x in arrays))
    return dq_bthd[:, :length], dk_bthd[:, :length], dv_bthd[:, :length]


def _whole_tiles(x_bthd: jax.Array) -> jax.Array:
    return jnp.pad(x_bthd, ((0, 0), (0, -x_bthd.shape[1] % TILE), (0, 0), (0, 0)))


def _visible_to_themselves(mask: PackedMask) -> tuple[jax.Array, jax.Array]:
    """The first visible key of each query in rows padded to whole tiles, in which padding sees itself; and whether each
    query of the original rows sees any key, bool [B, T]."""
    length = mask.start_bt.shape[1]
    position_t = jnp.arange(length + -length % TILE, dtype=jnp.int32)
    start_bt = jnp.pad(mask.start_bt, ((0, 0), (0, -length % TILE)), constant_values=position_t.size)
    return jnp.minimum(start_bt, position_t), mask.start_bt <= position_t[:length]


# Tiles. Hopper: what tokamax's own tuning found on an H100 for heads of 64 and 128 up to 8,192 tokens, causal (forward
# 64 queries for each of two warp groups by 128 keys, two or three stages; backward 64 by 64, two stages). Blackwell:
# tokamax's heuristics, for which it has no measurement.
_CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sm90": (
        {"block_q": 64, "block_kv": 128, "num_stages": 2, "persistent": False},
        {"block_q_dkv": 64, "block_kv_dkv": 64, "block_q_dq": 64, "block_kv_dq": 64, "num_stages": 2, "compute_wgs": 2},
    ),
    "sm100": (
        {"block_q": 128, "block_kv": 128, "num_stages": 2, "collective": False, "persistent": False},
        {"block_q_dkv": 128, "block_kv_dkv": 128, "block_q_dq": 128, "block_kv_dq": 128, "num_stages": 2},
    ),
}


@dataclass(frozen=True)
class _Kernels:
    forward: Any
    forward_config: Any
    backward: Any
    backward_config: Any


@cache
def _kernels(architecture: str | None) -> _Kernels:
    """tokamax's kernels for one row, and their tiles. They are called directly, because the functions around them query
    the default device."""
    assert architecture is not None
    modules = "tokamax._src.ops.attention.pallas_mosaic_gpu"
    forward = importlib.import_module(f"{modules}_kernel_{architecture}")
    backward = importlib.import_module(f"{modules}_vjp_kernel_{architecture}")
    forward_config, backward_config = _CONFIGS[architecture]
    return _Kernels(
        forward.flash_attention_kernel,
        forward.Config(**forward_config),
        backward.flash_attention_vjp_kernel,
        backward.Config(**backward_config),
    )
