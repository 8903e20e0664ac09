"""Accelerators by name: what the compiler and the roofline need to know, and devices to compile for without having any.

Sources. GPUs: NVIDIA's datasheets and architecture whitepapers (GA100, GA102, AD102, GH100) for cores, clocks, L2,
bandwidths and dense bfloat16 rates with float32 accumulation; the CUDA C++ Programming Guide, table "Technical
Specifications per Compute Capability", for shared memory and threads; memory as the CUDA driver reports it (less than
the name of the card says). TPUs: the system-architecture pages of Google Cloud's TPU documentation, per chip.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax.experimental import topologies

from flacuna_jax.errors import UserError

KIB, MIB, GIB = 2**10, 2**20, 2**30


@dataclass(frozen=True)
class GpuFacts:
    """What XLA's GPU compiler reads from the driver when there is one."""

    compute_capability: tuple[int, int]
    cores: int
    """Streaming multiprocessors."""
    fp32_lanes: int
    """Per multiprocessor."""
    clock_ghz: float
    l2_bytes: int
    shared_memory_per_core: int
    shared_memory_per_block: int
    """The most one kernel may ask for: the limit on tile sizes. Bytes."""
    threads_per_core: int


@dataclass(frozen=True)
class Target:
    """One kind of accelerator. Bytes, bytes per second and FLOP per second, per JAX device."""

    device_kind: str
    """As `jax.Device.device_kind` says it."""
    platform: Literal["cuda", "tpu"]
    memory: int
    memory_bandwidth: float
    bf16_flops: float
    """Dense peak."""
    link_bandwidth: float
    """To the other devices of its host, received, all links together: NVLink, PCIe 4 or the TPU's torus."""
    gpu: GpuFacts | None = None
    tpu_topology: str = ""
    """libtpu's name of the generation."""
    tpu_dimensions: int = 2


def _ampere_consumer(cores: int, clock_ghz: float) -> GpuFacts:
    return GpuFacts((8, 6), cores, 128, clock_ghz, 6 * MIB, 100 * KIB, 99 * KIB, 1536)


def _ada(cores: int, clock_ghz: float, l2_mib: int) -> GpuFacts:
    return GpuFacts((8, 9), cores, 128, clock_ghz, l2_mib * MIB, 100 * KIB, 99 * KIB, 1536)


_A100 = GpuFacts((8, 0), 108, 64, 1.41, 40 * MIB, 164 * KIB, 163 * KIB, 2048)
_HOPPER = GpuFacts((9, 0), 132, 128, 1.98, 50 * MIB, 228 * KIB, 227 * KIB, 2048)
_PCIE_4 = 32e9
_NVLINK_3, _NVLINK_4 = 300e9, 450e9

TARGETS = {
    "a6000": Target("NVIDIA RTX A6000", "cuda", 51_041_271_808, 768e9, 154.8e12, _PCIE_4, _ampere_consumer(84, 1.80)),
    "3090": Target(
        "NVIDIA GeForce RTX 3090", "cuda", int(23.69 * GIB), 936e9, 71e12, _PCIE_4, _ampere_consumer(82, 1.70)
    ),
    "4090": Target("NVIDIA GeForce RTX 4090", "cuda", int(23.65 * GIB), 1008e9, 165.2e12, _PCIE_4, _ada(128, 2.52, 72)),
    "l40s": Target("NVIDIA L40S", "cuda", int(44.5 * GIB), 864e9, 362.05e12, _PCIE_4, _ada(142, 2.52, 96)),
    "a100-40gb": Target("NVIDIA A100-SXM4-40GB", "cuda", 42_331_013_120, 1555e9, 312e12, _NVLINK_3, _A100),
    "a100-80gb": Target("NVIDIA A100-SXM4-80GB", "cuda", 85_100_068_864, 2039e9, 312e12, _NVLINK_3, _A100),
    "h100": Target("NVIDIA H100 80GB HBM3", "cuda", 84_942_979_072, 3352e9, 989.4e12, _NVLINK_4, _HOPPER),
    "h200": Target("NVIDIA H200", "cuda", int(139.8 * GIB), 4800e9, 989.4e12, _NVLINK_4, _HOPPER),
    "v4": Target("TPU v4", "tpu", 32 * GIB, 1228e9, 275e12, 300e9, tpu_topology="v4", tpu_dimensions=3),
    "v5e": Target("TPU v5 lite", "tpu", 16 * GIB, 819e9, 197e12, 200e9, tpu_topology="v5e"),
    "v5p": Target("TPU v5", "tpu", 95 * GIB, 2765e9, 459e12, 600e9, tpu_topology="v5p", tpu_dimensions=3),
    "v6e": Target("TPU v6 lite", "tpu", 32 * GIB, 1638e9, 918e12, 448e9, tpu_topology="v6e"),
}
_ALIASES = {"rtxa6000": "a6000", "rtx3090": "3090", "rtx4090": "4090", "a100": "a100-80gb", "v5lite": "v5e"}


def parse_target(text: str) -> tuple[Target, int]:
    """`4xA6000`, `8 x h100` or `v5e` (one device) to the kind and the count.

    Raises UserError for a kind that is not in `TARGETS` or a count below 1.
    """
    found = re.fullmatch(r"\s*(?:(\d+)\s*[x×*]\s*)?(\S+)\s*", text.lower())
    name = found[2] if found else text
    name = _ALIASES.get(name, name)
    if not found or name not in TARGETS or found[1] == "0":
        raise UserError(f"target {text!r}: say COUNTxKIND, as in 4xA6000; kinds: {', '.join(TARGETS)}")
    return TARGETS[name], int(found[1] or 1)


def absent_devices(target: Target, count: int) -> Sequence[jax.Device]:
    """`count` devices of a kind that need not be present: build a Mesh of them, lower with shardings on it, compile.

    The real compilers run, so memory_analysis(), the optimised program and resource limits are those of the hardware;
    nothing can be executed. Use the ambient mesh (`jax.set_mesh`) when lowering, so that kernels are chosen for it.

    Raises UserError where the compiler for the platform is not installed or has no such arrangement of devices.
    """
    names: dict[str, Any]
    if target.gpu is not None:
        shape = f"1x1x{count}"
        names = {"platform": "cuda", "topology": shape, "target_config": gpu_target_config(target)}
        needs = "jax-cuda12-plugin (of jax's version) and nvidia-cuda-nvcc-cu12"
    else:
        shape = f"{target.tpu_topology}:{_torus(count, target.tpu_dimensions)}"
        # One device per chip on v4: its two cores work as one. Newer generations do so by default.
        names = {"platform": "tpu"} | ({"chip_config_name": "megacore"} if target.tpu_topology == "v4" else {})
        needs = "jax[tpu]"
    try:
        devices = topologies.get_topology_desc(shape, **names).devices
    except Exception as error:
        raise UserError(
            f"cannot compile for {count} × {target.device_kind} here: install {needs}. The compiler said: {error}"
        ) from error
    return devices[:count]


def gpu_target_config(target: Target) -> str:
    """XLA's description of a GPU (text of a GpuTargetConfigProto)."""
    gpu = target.gpu
    if gpu is None:
        raise ValueError(f"{target.device_kind} is not a GPU")
    major, minor = gpu.compute_capability
    extension = "ACCELERATED_FEATURES" if major >= 9 else "NONE"  # sm_90a: warp-group matrix instructions
    return f"""
gpu_device_info {{
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: {gpu.threads_per_core}
  core_count: {gpu.cores}  fpus_per_core: {gpu.fp32_lanes}  clock_rate_ghz: {gpu.clock_ghz}
  shared_memory_per_block: {48 * KIB}  shared_memory_per_block_optin: {gpu.shared_memory_per_block}
  shared_memory_per_core: {gpu.shared_memory_per_core}  l2_cache_size: {gpu.l2_bytes}
  registers_per_core_limit: {64 * KIB}  registers_per_block_limit: {64 * KIB}
  block_dim_limit_x: {2**31 - 1}  block_dim_limit_y: {2**16 - 1}  block_dim_limit_z: {2**16 - 1}
  device_memory_size: {target.memory}  memory_bandwidth: {int(target.memory_bandwidth)}
  cuda_compute_capability {{ major: {major}  minor: {minor}  feature_extension: {extension} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9  minor: 10 }}
device_description_str: "{target.device_kind}"
"""


def _torus(count: int, dimensions: int) -> str:
    """The smallest slice with at least `count` chips."""
    for sides in _TPU_SLICES[dimensions]:
        if math.prod(sides) >= count:
            return "x".join(map(str, sides))
    raise UserError(f"{count} TPU chips are more than one slice that can be planned for ({math.prod(sides)})")


_TPU_SLICES = {
    2: ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    3: ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8)),
}
