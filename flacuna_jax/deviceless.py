"""Compiling for absent devices, with whatever version of JAX and its compilers is installed.

Two things change between releases:

- Since 0.11, Pallas-Triton's lowering reads the name of its GPU from the ambient abstract mesh and looks it up in a
  list. A GPU that is not in the list (RTX A6000, A40, A10G, L40S, RTX 3090) is accepted only if it is present. For an
  absent one, `StandIn` substitutes the name of a listed GPU of the same compute capability; the lowering reads nothing
  else.
- Compiler options are added and removed. An unknown option is an error, so `known_options` tests each option first.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, SingleDeviceSharding

from flacuna_jax.compiler import QUICK, Options

LISTED_GPUS = {
    "8.0": "NVIDIA A100",
    "8.6": "NVIDIA A10",
    "8.9": "NVIDIA L40",
    "9.0": "NVIDIA H100",
    "10.0": "NVIDIA B200",
    "12.0": "NVIDIA RTX PRO 6000",
}
"""Compute capability → the name of a GPU in Pallas-Triton's list."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StandIn(AbstractDevice):
    """A device that JAX's lowering knows, in place of one that it does not know."""

    stands_for: str
    """`device_kind` of the device that the program is compiled for; tile sizes depend on it."""


def kind_compiled_for(device: AbstractDevice) -> str:
    """The kind of the device that the program is compiled for."""
    return device.stands_for if isinstance(device, StandIn) else device.device_kind


@contextmanager
def lowering_for(mesh: Mesh) -> Iterator[None]:
    """The context for tracing and lowering a program for a mesh whose devices may be absent.

    It is `jax.set_mesh`, with a stand-in if JAX refuses to lower kernels for the devices' own kind.
    """
    stand_in = _stand_in(mesh.devices.flat[0])
    with jax.set_mesh(mesh):
        if stand_in is None:
            yield
            return
        abstract = mesh.abstract_mesh
        named = AbstractMesh(abstract.axis_sizes, abstract.axis_names, abstract.axis_types, abstract_device=stand_in)
        with jax.sharding.use_abstract_mesh(named):
            yield


def _stand_in(device: jax.Device) -> StandIn | None:
    """The stand-in for a device; None if JAX lowers kernels for the device itself, or if no stand-in is known."""
    if device.platform not in ("gpu", "cuda"):
        return None
    kind, cores = device.device_kind, getattr(device, "core_count", None)
    listed = LISTED_GPUS.get(getattr(device, "compute_capability", ""))
    if listed is None or _lowers_kernels(AbstractDevice(device_kind=kind, num_cores=cores, platform="gpu")):
        return None
    return StandIn(device_kind=listed, num_cores=cores, platform="gpu", stands_for=kind)


@cache
def _lowers_kernels(device: AbstractDevice) -> bool:
    """Whether Pallas-Triton lowers for a device, tested with a kernel that copies 16 numbers."""
    try:
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import triton as plgpu
    except ImportError:
        return True  # there are no kernels to lower

    def copy(x_ref: Any, y_ref: Any) -> None:
        y_ref[...] = x_ref[...]

    x = jax.ShapeDtypeStruct((16,), jnp.float32)
    kernel = pl.pallas_call(copy, out_shape=x, compiler_params=plgpu.CompilerParams())
    mesh = AbstractMesh((1,), ("devices",), (AxisType.Auto,), abstract_device=device)
    try:
        with jax.sharding.use_abstract_mesh(mesh):
            jax.jit(kernel).trace(x).lower(lowering_platforms=("cuda",))
    except RuntimeError:
        return False
    return True


@contextmanager
def not_cached(device: jax.Device) -> Iterator[None]:
    """Keeps programs for an absent device out of JAX's cache on disk, from which JAX cannot read them back."""
    name = "jax_persistent_cache_min_compile_time_secs"
    previous = getattr(jax.config, name)
    if device not in jax.devices():
        jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, previous)


def quick_options(device: jax.Device) -> Options:
    """Options that minimize the optimization effort of the device's compiler; {} if it always compiles quickly."""
    candidates = QUICK.get(device.platform, ())
    for options in candidates:
        if _accepted(device, options):
            return options
    if candidates:
        _logger.warning(
            "the compiler for %s knows none of the options that reduce its effort (%s); compiling takes minutes",
            device.device_kind,
            ", ".join(name for options in candidates for name in options),
        )
    return {}


def known_options(mesh: Mesh, options: Mapping[str, Any]) -> Options:
    """The options that the compiler of the mesh's devices knows. A warning lists the others."""
    if not options:
        return {}
    here = jax.process_index()
    device = next((device for device in mesh.devices.flat if device.process_index == here), None)
    if device is None or _accepted(device, options):
        return dict(options)
    known = {name: value for name, value in options.items() if _accepted(device, {name: value})}
    gone = ", ".join(f"{name}={value}" for name, value in options.items() if name not in known)
    _logger.warning("the compiler for %s does not know %s; compiling without", device.device_kind, gone)
    return known


def _accepted(device: jax.Device, options: Mapping[str, Any]) -> bool:
    """Whether the device's compiler accepts the options, tested by compiling an addition."""
    return _accepts(device, tuple(options.items()))


@cache
def _accepts(device: jax.Device, options: tuple[tuple[str, Any], ...]) -> bool:
    x = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=SingleDeviceSharding(device))
    try:
        with not_cached(device):
            jax.jit(lambda x: x + 1).lower(x).compile(dict(options))
    except (TypeError, ValueError):  # a value that this release's Python side does not convert
        return False
    except jax.errors.JaxRuntimeError as error:
        return "INVALID_ARGUMENT" not in str(error)  # other errors are not about the options
    return True
