"""The entry point of attention: checks, choice of backend and tiles, partitioning over the mesh, and names for remat.

A backend is a pair of functions behind one `custom_vjp`:

    forward(q, k, v, mask, scale=..., ...) -> o [B, T, H, D], lse [B, H, T]
    backward(q, k, v, mask, o, lse, do, scale=..., ...) -> dq, dk, dv

lse is float32: log2 of the sum of exp2(log2(e) score) over the visible keys, 0 if there are none. A score is
scale · q·k, capped if there is a `softcap`.
"""

import importlib
import logging
from dataclasses import dataclass
from functools import cache, partial
from types import ModuleType
from typing import Any, Literal, get_args

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec
from jax.typing import DTypeLike

from flacuna_jax.deviceless import kind_compiled_for
from flacuna_jax.kernels import attention_cudnn, attention_tokamax
from flacuna_jax.kernels.axes import BATCH_AXES, TENSOR_AXIS
from flacuna_jax.kernels.packed_mask import PackedMask
from flacuna_jax.kernels.tiles import GpuTiles, TpuTiles, gpu_holds, gpu_tiles, measured_seconds, tpu_tiles

Backend = Literal["auto", "xla", "pallas_gpu", "pallas_tpu", "cudnn", "tokamax"]
OUTPUT_NAME = "attention_output"
LSE_NAME = "attention_lse"
NO_TRITON = ": the installed jax has no Triton lowering of Pallas"
SAVED_NAMES = (OUTPUT_NAME, LSE_NAME)
"""For `jax.checkpoint_policies.save_only_these_names`: with both saved, the forward kernel runs once per step."""
_logger = logging.getLogger(__name__)


AMPERE = 8.0
"""The first compute capability with bfloat16 tensor cores, which the Triton kernels use."""


@cache
def _module(backend: Backend) -> ModuleType | None:
    """The kernels of a backend, imported on first use, because those for accelerators import large parts of Pallas.
    None for pallas_gpu without the Triton lowering of Pallas, whose removal JAX has announced; only it needs that."""
    try:
        return importlib.import_module(f"flacuna_jax.kernels.attention_{backend.removeprefix('pallas_')}")
    except ImportError:
        if backend != "pallas_gpu":
            raise
        return None


def attention(
    q_bthd: jax.Array,
    k_bthd: jax.Array,
    v_bthd: jax.Array,
    mask: PackedMask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    backend: Backend = "auto",
    tiles: GpuTiles | TpuTiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention within the documents of packed rows.

    q [B, T, H, D], k and v [B, T, Hkv, D] of one dtype (float32 or bfloat16), H a multiple of Hkv: query head h reads
    key head h // (H / Hkv). `scale` > 0 defaults to D ** -0.5. `softcap` > 0 limits scores, see `kernels.softcap`.
    Returns q's shape and dtype; padding rows are exactly 0 and receive no gradient. Softmax and sums are float32.

    Under a mesh (`jax.set_mesh`) with axes of type Auto, rows are split over `data` and `fsdp`, and heads over
    `tensor`.

    `backend` "auto" selects the kernels of the target platform, which may differ from the platform that traces. `tiles`
    overrides the table of `kernels.tiles`, for the tuner. `interpret` runs Pallas kernels without their hardware,
    slowly, for tests. "cudnn" is for GPUs and rows of one document each, which the mask must promise; "auto" never
    selects it (see `attention_cudnn`). "tokamax" is for Hopper and Blackwell; "auto" selects it if there are no
    Pallas-Triton kernels, or if it is faster by the measurements in `tiles_measured.json`.

    Raises ValueError if shapes, dtypes or options are inconsistent, and UserError if "cudnn" or "tokamax" does not
    support them.
    """
    _check_arrays(q_bthd, k_bthd, v_bthd, mask)
    _check_options(backend, scale, softcap, tiles)
    device_kind, platform = ambient_device()
    dim, dtype = q_bthd.shape[-1], q_bthd.dtype
    require_backend(backend, dim, dtype, platform or jax.default_backend(), device_kind, mask.one_document, softcap)
    plan = _Plan(
        backend=_resolve(backend, platform, device_kind, dim, dtype, mask.one_document, softcap),
        device_kind=device_kind,
        scale=float(q_bthd.shape[-1] ** -0.5 if scale is None else scale),
        softcap=softcap,
        tiles=tiles,
        interpret=interpret,
    )
    return _attention(q_bthd, k_bthd, v_bthd, mask, plan)


def require_backend(
    backend: Backend,
    dim: int,
    dtype: DTypeLike,
    platform: str,
    device_kind: str | None,
    one_document: bool,
    softcap: float | None = None,
) -> None:
    """Raises the UserError of `attention` before there are arrays: for "cudnn" or "tokamax" if they do not support the
    machine, the heads or the mask."""
    if backend == "cudnn":
        attention_cudnn.check(dim, dtype, one_document, platform, softcap)
    elif backend == "tokamax":
        attention_tokamax.check(dim, dtype, platform, device_kind, softcap)


@dataclass(frozen=True)
class _Plan:
    """All choices made before tracing."""

    backend: Backend
    device_kind: str | None
    scale: float
    softcap: float | None
    tiles: GpuTiles | TpuTiles | None
    interpret: bool

    def options(self, backend: Backend, dim: int, dtype: Any) -> dict[str, Any]:
        if backend == "cudnn":
            return {"scale": self.scale}
        if backend == "tokamax":
            return {"scale": self.scale, "device_kind": self.device_kind}
        if backend == "xla":
            return {"scale": self.scale, "softcap": self.softcap}
        table: Any = gpu_tiles if backend == "pallas_gpu" else tpu_tiles
        chosen = self.tiles or table(self.device_kind, dim, dtype)
        return {"scale": self.scale, "softcap": self.softcap, "tiles": chosen, "interpret": self.interpret}


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q_bthd: jax.Array, k_bthd: jax.Array, v_bthd: jax.Array, mask: PackedMask, plan: _Plan) -> jax.Array:
    return _run(plan, "forward", q_bthd, k_bthd, v_bthd, mask)[0]


def _attention_forward(
    q_bthd: jax.Array, k_bthd: jax.Array, v_bthd: jax.Array, mask: PackedMask, plan: _Plan
) -> tuple[jax.Array, tuple[Any, ...]]:
    o_bthd, lse_bht = _run(plan, "forward", q_bthd, k_bthd, v_bthd, mask)
    o_bthd, lse_bht = checkpoint_name(o_bthd, OUTPUT_NAME), checkpoint_name(lse_bht, LSE_NAME)
    return o_bthd, (q_bthd, k_bthd, v_bthd, mask, o_bthd, lse_bht)


def _attention_backward(plan: _Plan, saved: tuple[Any, ...], do_bthd: jax.Array) -> tuple[Any, ...]:
    return (*_run(plan, "backward", *saved, do_bthd), None)


_attention.defvjp(_attention_forward, _attention_backward)


def _run(plan: _Plan, direction: Literal["forward", "backward"], *args: Any) -> Any:
    """Runs one direction of the plan's backend on every device's own rows and heads."""
    q_bthd = args[0]

    def of(backend: Backend) -> Any:
        function = getattr(_module(backend), direction)
        return partial(function, **plan.options(backend, q_bthd.shape[-1], q_bthd.dtype))

    def local(*args: Any) -> Any:
        if plan.backend == "auto":
            gpu, _ = _gpu_backend(plan.device_kind, q_bthd.shape[-1], q_bthd.dtype, plan.softcap)
            return lax.platform_dependent(*args, cuda=of(gpu), tpu=of("pallas_tpu"), default=of("xla"))
        return of(plan.backend)(*args)

    axes = _auto_axes()
    if not axes:
        return local(*args)
    rows, heads = _partition(axes, q_bthd.shape[0], q_bthd.shape[2], args[1].shape[2])
    matrix, statistic = PartitionSpec(rows, None, heads, None), PartitionSpec(rows, heads, None)
    in_specs: tuple[PartitionSpec, ...] = (matrix, matrix, matrix, PartitionSpec(rows, None))
    out_specs: tuple[PartitionSpec, ...] = (matrix, statistic)
    if direction == "backward":
        in_specs, out_specs = (*in_specs, matrix, statistic, matrix), (matrix, matrix, matrix)
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, axis_names=set(axes), check_vma=False)(*args)


def ambient_device() -> tuple[str | None, str | None]:
    """(device kind, platform) of the target, as far as they are known while tracing.

    The ambient mesh has both, even if its devices are absent. Without a mesh, the kind is that of this process, which
    only affects tile sizes, and the platform is not known until lowering.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return kind_compiled_for(described), described.platform
    return jax.devices()[0].device_kind, None


def _compute_capability(device_kind: str | None) -> float | None:
    """Of the GPUs of this process; None for other kinds. An absent GPU that can be planned for has kernels, or a name
    that does not begin with NVIDIA."""
    here = jax.devices()[0]
    found = getattr(here, "compute_capability", None) if here.device_kind == device_kind else None
    return None if found is None else float(found)


def _gpu_backend(
    device_kind: str | None, dim: int, dtype: DTypeLike, softcap: float | None = None
) -> tuple[Backend, str]:
    """The fastest known backend for an NVIDIA GPU, and a remark about the choice for the log."""
    capability = _compute_capability(device_kind)
    if capability is not None and capability < AMPERE:
        return "xla", f" of compute capability {capability}, and the kernels need {AMPERE}"
    has_triton = _module("pallas_gpu") is not None and gpu_holds(dim, dtype)
    misfit = attention_tokamax.misfit(dim, dtype, "gpu", device_kind, softcap)
    measured = measured_seconds(device_kind, dim, dtype)
    tokamax_is_faster = "tokamax" in measured and min(measured, key=lambda name: measured[name]) == "tokamax"
    if not has_triton:
        why = " and this package has no kernels for them" + (NO_TRITON if _module("pallas_gpu") is None else "")
        return ("xla", f"{why}; tokamax {misfit}") if misfit else ("tokamax", why)
    if not tokamax_is_faster:
        return "pallas_gpu", ""
    times = ", ".join(f"{name} {1e3 * seconds:.3g} ms" for name, seconds in measured.items())
    if misfit:
        return "pallas_gpu", f"; tokamax is measured to be faster ({times}), but {misfit}"
    return "tokamax", f", where it is measured to be the fastest ({times})"


def _resolve(
    backend: Backend,
    platform: str | None,
    device_kind: str | None,
    dim: int,
    dtype: DTypeLike,
    one_document: bool,
    softcap: float | None = None,
) -> Backend:
    if backend != "auto":
        return backend
    if platform is None:
        _log_once("attention: no ambient mesh, the backend depends on the platform at lowering")
        return "auto"
    chosen: Backend = "xla"
    more = ""
    if platform == "tpu":
        chosen = "pallas_tpu"
    elif platform in ("gpu", "cuda") and str(device_kind).startswith("NVIDIA"):
        chosen, more = _gpu_backend(device_kind, dim, dtype, softcap)
    elif platform != "cpu":
        more = " and there are no kernels for them"
    if chosen == "pallas_gpu" and one_document and softcap is None:
        more += "; cudnn supports these rows, but is neither measured to be faster nor bit-identical between runs"
    _log_once(f"attention: backend {chosen}, because the mesh has {platform} devices ({device_kind}){more}")
    return chosen


def _auto_axes() -> dict[str, int]:
    """Axes of the ambient mesh that this module partitions over; none inside of a shard_map or on one device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
        return {}
    return {
        name: size
        for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    }


def _partition(
    axes: dict[str, int], batch: int, heads: int, kv_heads: int
) -> tuple[tuple[str, ...] | None, str | None]:
    """Mesh axes of rows and of heads. A dimension that an axis does not divide is computed whole on each device."""
    rows: tuple[str, ...] = ()
    for name in BATCH_AXES:
        taken = axes.get(name, 1)
        for earlier in rows:
            taken *= axes[earlier]
        if name in axes and batch % taken == 0:
            rows += (name,)
    tensor = axes.get(TENSOR_AXIS, 1)
    split_heads = tensor > 1 and heads % tensor == 0 and kv_heads % tensor == 0
    if tensor > 1 and not split_heads:
        _log_once(
            f"attention: mesh axis {TENSOR_AXIS} ({tensor}) does not divide {heads} and {kv_heads} heads; not split"
        )
    return rows or None, TENSOR_AXIS if split_heads else None


@cache
def _log_once(message: str) -> None:
    _logger.info(message)


def _check_arrays(q_bthd: jax.Array, k_bthd: jax.Array, v_bthd: jax.Array, mask: PackedMask) -> None:
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


def _check_options(backend: str, scale: float | None, softcap: float | None, tiles: GpuTiles | TpuTiles | None) -> None:
    if backend not in get_args(Backend):
        raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(get_args(Backend))}")
    if backend != "auto" and _module(backend) is None:
        raise ValueError(f"backend {backend} is not available{NO_TRITON}; use auto")
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}, but must be above 0")
    kinds: dict[str, type] = {"pallas_gpu": GpuTiles, "pallas_tpu": TpuTiles}
    if tiles is not None and not (backend in kinds and isinstance(tiles, kinds[backend])):
        raise ValueError(f"{type(tiles).__name__} given with backend {backend}, which has other tiles")
