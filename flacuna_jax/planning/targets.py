"""Accelerators by name: facts for the compiler and the roofline, and absent devices to compile for.

Sources. GPUs: NVIDIA's datasheets and architecture whitepapers (TU102, GA100, GA102, AD102, GH100, Blackwell) for
cores, clocks, L2, bandwidths and dense bfloat16 rates with float32 accumulation; the CUDA C++ Programming Guide, table
"Technical Specifications per Compute Capability", for shared memory and threads; memory as reported by the CUDA driver
(less than in the name of the card). TPUs: the system-architecture pages of Google Cloud's TPU documentation, per chip.
Networks between hosts: those of vendors' reference systems (DGX A100: a 200 Gb/s port per GPU, DGX H100/H200: 400
Gb/s), and one 100 Gb/s port shared by four cards for workstation and PCIe servers; between TPU slices the data-center
bandwidth that those pages give per pod (v5e 6.4, v6e 25.6 Tb/s for 256 chips), for v4 and v5p a 200 Gb/s port per four
chips.
"""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax.experimental import topologies

from flacuna_jax.compiler import MEMORY_FRACTION
from flacuna_jax.errors import UserError
from flacuna_jax.model.sharding import tpu_slices
from flacuna_jax.planning.calibration import Calibration, read_calibration

KIB, MIB, GIB = 2**10, 2**20, 2**30


@dataclass(frozen=True)
class GpuFacts:
    """Facts that XLA's GPU compiler reads from the driver if there is one."""

    compute_capability: tuple[int, int]
    cores: int
    """Streaming multiprocessors."""
    fp32_lanes: int
    """Per multiprocessor."""
    clock_ghz: float
    l2_bytes: int
    shared_memory_per_core: int
    shared_memory_per_block: int
    """Maximum shared memory of a kernel in bytes, which limits tile sizes."""
    threads_per_core: int


@dataclass(frozen=True)
class Target:
    """One kind of accelerator. Bytes, bytes per second and FLOP per second, per JAX device."""

    device_kind: str
    """The value of `jax.Device.device_kind`."""
    platform: Literal["cuda", "tpu", "cpu"]
    memory: int
    memory_bandwidth: float
    bf16_flops: float
    """Dense peak."""
    link_bandwidth: float
    """Received from the other devices of its host (for a TPU: of its slice), all links together."""
    link: Literal["PCIe 4", "NVLink 3", "NVLink 4", "NVLink 5", "ICI", "memory"]
    network_bandwidth: float = 0.0
    """A device's share of the bandwidth that its host (for a TPU: its slice, whose torus spans the hosts) has for
    receiving from others."""
    gpu: GpuFacts | None = None
    tpu_topology: str = ""
    """libtpu's name of the generation."""
    tpu_dimensions: int = 2


def _ampere_consumer(cores: int, clock_ghz: float) -> GpuFacts:
    return GpuFacts((8, 6), cores, 128, clock_ghz, 6 * MIB, 100 * KIB, 99 * KIB, 1536)


def _ada(cores: int, clock_ghz: float, l2_mib: int) -> GpuFacts:
    return GpuFacts((8, 9), cores, 128, clock_ghz, l2_mib * MIB, 100 * KIB, 99 * KIB, 1536)


_TURING = GpuFacts((7, 5), 40, 64, 1.59, 4 * MIB, 64 * KIB, 64 * KIB, 1024)
_A100 = GpuFacts((8, 0), 108, 64, 1.41, 40 * MIB, 164 * KIB, 163 * KIB, 2048)
_HOPPER = GpuFacts((9, 0), 132, 128, 1.98, 50 * MIB, 228 * KIB, 227 * KIB, 2048)
_B200 = GpuFacts((10, 0), 148, 128, 1.965, 126 * MIB, 228 * KIB, 227 * KIB, 2048)
_RTX_5090 = GpuFacts((12, 0), 170, 128, 2.407, 96 * MIB, 100 * KIB, 99 * KIB, 1536)


def _pcie(kind: str, memory: int, bandwidth: float, flops: float, gpu: GpuFacts) -> Target:
    return Target(kind, "cuda", memory, bandwidth, flops, 32e9, "PCIe 4", 12.5e9 / 4, gpu)


def _a100(kind: str, memory: int, bandwidth: float) -> Target:
    return Target(kind, "cuda", memory, bandwidth, 312e12, 300e9, "NVLink 3", 25e9, _A100)


def _hopper(kind: str, memory: int, bandwidth: float) -> Target:
    return Target(kind, "cuda", memory, bandwidth, 989.4e12, 450e9, "NVLink 4", 50e9, _HOPPER)


def _tpu(
    kind: str, gib: int, bandwidth: float, flops: float, ici: float, network: float, name: str, dimensions: int = 2
) -> Target:
    memory = gib * GIB
    return Target(
        kind, "tpu", memory, bandwidth, flops, ici, "ICI", network, tpu_topology=name, tpu_dimensions=dimensions
    )


TARGETS = {
    # Its tensor cores do not multiply bfloat16; XLA computes such products in float32, at this rate.
    "t4": _pcie("Tesla T4", int(14.75 * GIB), 320e9, 8.1e12, _TURING),
    "a6000": _pcie("NVIDIA RTX A6000", 51_041_271_808, 768e9, 154.8e12, _ampere_consumer(84, 1.80)),
    "3090": _pcie("NVIDIA GeForce RTX 3090", int(23.69 * GIB), 936e9, 71e12, _ampere_consumer(82, 1.70)),
    "a40": _pcie("NVIDIA A40", int(44.3 * GIB), 696e9, 149.7e12, _ampere_consumer(84, 1.74)),
    "a10": _pcie("NVIDIA A10", int(22.0 * GIB), 600e9, 125e12, _ampere_consumer(72, 1.695)),
    "a10g": _pcie("NVIDIA A10G", int(22.2 * GIB), 600e9, 70e12, _ampere_consumer(80, 1.71)),
    "4090": _pcie("NVIDIA GeForce RTX 4090", int(23.65 * GIB), 1008e9, 165.2e12, _ada(128, 2.52, 72)),
    "l4": _pcie("NVIDIA L4", int(22.0 * GIB), 300e9, 121e12, _ada(58, 2.04, 48)),
    "rtx6000ada": _pcie("NVIDIA RTX 6000 Ada Generation", int(47.4 * GIB), 960e9, 364.2e12, _ada(142, 2.505, 96)),
    "l40s": _pcie("NVIDIA L40S", int(44.5 * GIB), 864e9, 362.05e12, _ada(142, 2.52, 96)),
    "a100-40gb": _a100("NVIDIA A100-SXM4-40GB", 42_331_013_120, 1555e9),
    "a100-80gb": _a100("NVIDIA A100-SXM4-80GB", 85_100_068_864, 2039e9),
    "h100": _hopper("NVIDIA H100 80GB HBM3", 84_942_979_072, 3352e9),
    "h200": _hopper("NVIDIA H200", int(139.8 * GIB), 4800e9),
    "5090": _pcie("NVIDIA GeForce RTX 5090", int(31.3 * GIB), 1792e9, 209.5e12, _RTX_5090),
    "b200": Target("NVIDIA B200", "cuda", int(178 * GIB), 8000e9, 2250e12, 900e9, "NVLink 5", 50e9, _B200),
    "v4": _tpu("TPU v4", 32, 1228e9, 275e12, 300e9, 6.25e9, "v4", 3),
    "v5e": _tpu("TPU v5 lite", 16, 819e9, 197e12, 200e9, 3.125e9, "v5e"),
    "v5p": _tpu("TPU v5", 95, 2765e9, 459e12, 600e9, 6.25e9, "v5p", 3),
    "v6e": _tpu("TPU v6 lite", 32, 1638e9, 918e12, 448e9, 12.5e9, "v6e"),
}
_ALIASES = {
    "rtxa6000": "a6000",
    "rtx3090": "3090",
    "rtx4090": "4090",
    "rtx5090": "5090",
    "a100": "a100-80gb",
    "v5lite": "v5e",
}


@dataclass(frozen=True)
class Machine:
    """Accelerators of one kind, and their connections."""

    target: Target
    hosts: int = 1
    """Number of hosts; for a TPU, of slices, because a torus spans hosts."""
    devices_per_host: int = 1
    torus: tuple[int, ...] = ()
    """Sides of a TPU slice, if the user named them."""
    calibration: Calibration | None = None
    """What was measured on these devices."""

    @property
    def devices(self) -> int:
        return self.hosts * self.devices_per_host

    @property
    def description(self) -> str:
        hosts = f"{self.hosts} × " if self.hosts > 1 else ""
        torus = f" ({'×'.join(map(str, self.torus))})" if self.torus else ""
        return f"{hosts}{self.devices_per_host} × {self.target.device_kind}{torus}"

    @property
    def usable_memory(self) -> int:
        """Bytes per device that a compiled program may use. The runtime needs the rest.

        CUDA: about 1 GiB for the context, NCCL's buffers and libraries' workspaces, and 3 % for fragmentation; never
        more than the memory of the allocator. TPU: the part that libtpu reserves.
        """
        memory = self.target.memory
        if self.target.platform != "cuda":
            return memory - 256 * MIB
        return min(int(0.97 * memory) - GIB, int(MEMORY_FRACTION * memory))


def parse_target(text: str) -> Machine:
    """`4xA6000`, `16x8xH100` (hosts × devices each × kind), `v5p:4x4x8` (a slice), `2xv5e:16x16` (two), `v5e` (a chip).

    Raises UserError for a kind that is not in `TARGETS`, a count below 1, or sides that are not a torus.
    """
    found = re.fullmatch(r"(?:(\d+)[x×*])?(?:(\d+)[x×*])?([^:\s]+?)(?::(\d+(?:x\d+)*))?", text.lower().replace(" ", ""))
    name = found[3] if found else text
    name = _ALIASES.get(name, name)
    counts = [int(count) for count in found.groups()[:2] if count] if found else []
    if not found or name not in TARGETS or 0 in counts:
        raise UserError(
            f"target {text!r}: write COUNTxKIND (4xA6000), HOSTSxCOUNTxKIND (16x8xH100), a TPU slice (v5p:4x4x8) or "
            f"several (2xv5e:16x16); kinds: {', '.join(TARGETS)}"
        )
    target = TARGETS[name]
    if found[4] is None:
        hosts, each = (1, *counts)[-2:] if counts else (1, 1)
        return Machine(target, 1, hosts * each) if target.platform == "tpu" else Machine(target, hosts, each)
    torus = tuple(int(side) for side in found[4].split("x"))
    # v4 and v5p have three sides, the others two.
    if target.platform != "tpu" or len(counts) > 1 or len(torus) != target.tpu_dimensions or 0 in torus:
        sides = "x".join("4" * target.tpu_dimensions)
        example = f"{name}:{sides}" if target.platform == "tpu" else f"4x{name}"
        raise UserError(f"target {text!r}: write this kind like {example}")
    return Machine(target, counts[0] if counts else 1, math.prod(torus), torus)


def known_target(device: jax.Device) -> Target | None:
    """The facts of a device's kind; None if it is unknown."""
    return next((target for target in TARGETS.values() if target.device_kind == device.device_kind), None)


def present_machine(devices: Sequence[jax.Device]) -> Machine:
    """The machine of the given devices, by their kind, with what `flacuna plan --calibrate` measured on them.

    CPU devices have approximate facts, 160 GFLOP/s per core; they share their host's memory and cores.

    Raises UserError for an accelerator that is not in `TARGETS`.
    """
    first = devices[0]
    hosts = len({device.process_index for device in devices})
    if first.platform == "cpu":
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * hosts // len(devices)
        flops = 160e9 * (os.cpu_count() or 1) * hosts / len(devices)
        target = Target("CPU", "cpu", memory, 20e9, flops, 10e9, "memory", 1e9)
    else:
        known = known_target(first)
        if known is None:
            raise UserError(f"unknown device {first.device_kind!r}; it can be added in planning/targets.py")
        target = known
    if target.platform == "tpu":
        hosts = tpu_slices(devices)
    return Machine(target, hosts, len(devices) // hosts, calibration=read_calibration(devices))


# Without these, libtpu queries a metadata server that exists only on TPU hosts, searches other hosts, and permits only
# one process.
_COMPILE_ONLY_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # Without a type, libtpu prints a warning. Its value has no effect: the requested topology is compiled for.
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
}


class CompilerUnusable(UserError):
    """No compiler for a machine is usable here, so its plans are estimates."""


class CompilerMissing(CompilerUnusable):
    """The compiler for a platform is not installed here."""


def absent_devices(machine: Machine) -> list[jax.Device]:
    """The devices of a machine that may be absent: build a Mesh of them, lower with shardings on it, and compile.

    The real compilers run, so memory_analysis(), the optimised program and resource limits are those of the hardware,
    but nothing can be executed. Lower within `deviceless.lowering_for(mesh)`, so that kernels are selected for it.
    Without such hardware, JAX must run on the CPU (`jax_platforms`), because plugins would search for devices.

    Raises CompilerMissing if the compiler for the platform is not installed, CompilerUnusable if it does not support
    the machine, and a plain UserError if it rejects the sides of a slice that the user gave.
    """
    target = machine.target
    names: dict[str, Any]
    plugins: tuple[str, ...]
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # plugins print long messages about missing devices
    if target.gpu is not None:
        shape = f"1x{machine.hosts}x{machine.devices_per_host}"
        names = {"platform": "cuda", "topology": shape, "target_config": gpu_target_config(target)}
        plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    else:
        sides = machine.torus or _torus(machine.devices_per_host, target.tpu_dimensions)
        shape = f"{target.tpu_topology}:{'x'.join(map(str, sides))}"
        # One device per chip on v4: its two cores work as one. Newer generations do so by default.
        names = {"platform": "tpu", "num_slices": machine.hosts} | (
            {"chip_config_name": "megacore"} if target.tpu_topology == "v4" else {}
        )
        plugins = ("libtpu",)
        os.environ.update({key: os.environ.get(key, value) for key, value in _COMPILE_ONLY_TPU.items()})
    if not any(importlib.util.find_spec(plugin) for plugin in plugins):
        raise CompilerMissing(
            f"the compiler for {target.device_kind} is not installed: pip install 'flacuna-jax[compilers]'; "
            "no device is needed"
        )
    try:
        devices = topologies.get_topology_desc(shape, **names).devices
    except Exception as error:
        refusal = f"cannot compile for {machine.description} here: {error}"
        if machine.torus and "INVALID_ARGUMENT" in str(error):
            raise UserError(refusal) from error
        raise CompilerUnusable(refusal) from error
    return list(devices[: machine.devices])


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


def _torus(count: int, dimensions: int) -> tuple[int, ...]:
    """The sides of the smallest slice with at least `count` chips."""
    for sides in _TPU_SLICES[dimensions]:
        if math.prod(sides) >= count:
            return sides
    raise UserError(f"{count} TPU chips are more than the largest slice that can be planned ({math.prod(sides)})")


_TPU_SLICES = {
    2: ((2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
    3: ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8)),
}
