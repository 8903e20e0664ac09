"""Compiles the real train step for present or absent devices, without allocating arrays, and reads the result."""

import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh

from flacuna_jax.deviceless import lowering_for, not_cached, quick_options
from flacuna_jax.errors import UserError
from flacuna_jax.kernels import attention_xla, cross_entropy
from flacuna_jax.model.sharding import abstract_arrays, batch_sharding, make_mesh
from flacuna_jax.planning.estimate import Work, attention_flops, head_chunks, key_tiles
from flacuna_jax.planning.hlo import Program
from flacuna_jax.planning.workload import Layout, Workload
from flacuna_jax.training.network import REFERENCE
from flacuna_jax.training.state import StateLayout
from flacuna_jax.training.step import make_step

_logger = logging.getLogger(__name__)

_UNITS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class CompiledStep:
    """The step compiled by the compiler of the hardware. Sizes are in bytes per device."""

    arguments: int
    temporaries: int
    peak: int
    work: Work
    seconds: float
    """Time to trace and compile."""
    program: Program


@dataclass(frozen=True)
class OutOfMemory:
    """The compiler failed because the program does not fit into memory."""

    peak: int | None
    """Bytes that the program needs, if the compiler reported them."""
    message: str
    seconds: float


@dataclass(frozen=True)
class Refused:
    """The step could not be compiled, or the result could not be read, for a reason other than memory."""

    reason: str
    """The reason in one line."""
    seconds: float


def lower_step(workload: Workload, layout: Layout, devices: Sequence[jax.Device]) -> jax.stages.Lowered:
    """The trainer's own step (`training.step.make_step`) on abstract arguments, lowered for `devices`."""
    mesh = make_mesh(layout.mesh, devices)
    state = StateLayout(workload.spec, workload.optimizer, mesh)
    trainable, opt_state = state.trainable, state.opt_state
    step = make_step(workload.step.with_remat(layout.remat), state.optimizer, mesh, state.shardings)
    batch = _batch(workload, layout, mesh)
    index = jax.ShapeDtypeStruct((), "int32")
    with lowering_for(mesh):
        jitted = step.jitted  # type: ignore[attr-defined]
        return jitted.lower(trainable, opt_state, _frozen(workload, mesh), batch, index)


def _frozen(workload: Workload, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    if workload.spec.lora is None:
        return {}
    adapters = workload.spec.adapters if workload.reference_adapter else {}
    reference = {REFERENCE + path: parameter for path, parameter in adapters.items()}
    return abstract_arrays({**workload.spec.held, **reference}, mesh)


def _batch(workload: Workload, layout: Layout, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    shape = (workload.micro_batches(layout), layout.micro_batch * layout.shards, workload.length)
    sharding, leaves = batch_sharding(mesh), workload.step.objective.leaves
    return {leaf.name: jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding) for leaf in leaves}


def compile_step(
    workload: Workload, layout: Layout, devices: Sequence[jax.Device]
) -> CompiledStep | OutOfMemory | Refused:
    """Compiles the step. Catches all exceptions of JAX and the compiler, but not a `UserError`."""
    started = time.monotonic()
    try:
        return _compiled(workload, layout, devices, started)
    except UserError:
        raise
    except Exception as error:
        # Compilers for absent devices change with every release, and a plan works without them.
        seconds, first_line = time.monotonic() - started, str(error).partition("\n")[0]
        if "RESOURCE_EXHAUSTED" in str(error) and "shared memory" not in str(error).lower():
            return OutOfMemory(_stated_bytes(str(error)), first_line, seconds)
        _logger.debug("not compiled", exc_info=True)
        return Refused(f"{type(error).__name__}: {first_line}", seconds)


def _compiled(workload: Workload, layout: Layout, devices: Sequence[jax.Device], started: float) -> CompiledStep:
    options: Any = quick_options(devices[0])  # also numbers, which the types of older jax releases do not include
    lowered = lower_step(workload, layout, devices)
    with not_cached(devices[0]):
        compiled = lowered.compile(options or None)
    program = Program(compiled.as_text() or "", lambda op_name: _loop_trips(op_name, workload, layout))
    memory: Any = compiled.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    collectives = program.collectives
    if devices[0].platform == "tpu":
        # Only the full optimization effort, which is not used here, overlaps communication and arithmetic on a TPU.
        collectives = [replace(collective, overlapped=True) for collective in collectives]
    # On CPUs attention consists of plain products, which are already counted; elsewhere it is a kernel, which is not.
    attention = 0.0 if devices[0].platform == "cpu" else attention_flops(workload, layout)
    fresh_outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return CompiledStep(
        arguments=arguments,
        temporaries=temporaries,
        peak=arguments + temporaries + fresh_outputs,
        work=Work(program.matrix_flops, attention, program.memory_traffic, collectives),
        seconds=time.monotonic() - started,
        program=program,
    )


def _loop_trips(op_name: str, workload: Workload, layout: Layout) -> float:
    """Trip count of a loop whose count the compiler does not know, from the origin of the loop."""
    if cross_entropy.LOOP_SCOPE in op_name:
        return head_chunks(workload, layout)
    if attention_xla.LOOP_SCOPE in op_name:
        return key_tiles(workload, attention_xla.TILE)
    if op_name.count("while") > 1:
        return workload.spec.config.num_layers
    return workload.micro_batches(layout)


def _stated_bytes(message: str) -> int | None:
    """`Used 20.50G of 15.75G hbm`, `Out of memory while trying to allocate 123456 bytes`."""
    if found := re.search(r"[Uu]sed ([\d.]+)([KMG]i?B?|B) of", message):
        return int(float(found[1]) * _UNITS[found[2]])
    if found := re.search(r"allocate ([\d.]+) ?([KMG]iB|bytes)", message):
        return int(float(found[1]) * _UNITS.get(found[2], 1))
    return None
