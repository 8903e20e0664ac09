"""Mosaic GPU's interpreter of jax 0.12, completed for tokamax's attention kernels.

The interpreter runs the kernels' own jaxprs on a CPU, with threads, barriers, named barriers, shared and tensor memory.
Five things are missing in jax 0.12.0.1, and `interpreted` adds them: `pl.run_state`, a left operand of `wgmma` that is
in registers, the predicate of a TMA load, a named barrier for warp groups and a single warp, and a fence. One
difference remains: tensor core products and copies are asynchronous on hardware and immediate in the interpreter.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import pytest
from jax import lax
from jax._src.pallas.mosaic_gpu import core as mosaic_gpu_core
from jax._src.state.types import AbstractRef

pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.jaxpr_interpret", reason="jax 0.12 has the interpreter")
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret
from jax._src.pallas.mosaic_gpu.interpret import shared_memory as memory
from jax._src.state.discharge import run_state_p

Interpreter = jaxpr_interpret.JaxprInterpreter
Deferred = Callable[[], Any]


@contextmanager
def interpreted() -> Iterator[None]:
    """Kernels of Mosaic GPU that are traced inside run in the completed interpreter."""
    from jax.experimental.pallas import mosaic_gpu

    # The value makes the interpreter execute tokamax's named barriers and fences, which are inline PTX.
    parameters = mosaic_gpu.InterpretGPUParams(inline_mgpu="_hack_model_inline_mgpu_tokamax")
    with pytest.MonkeyPatch.context() as patch, mosaic_gpu.force_gpu_interpret_mode(parameters):
        patch.setattr(Interpreter, "interpret", _interpret)
        patch.setattr(Interpreter, "_interpret_wgmma_ref_p", _wgmma)
        patch.setattr(Interpreter, "_interpret_copy_gmem_to_smem_p", _load)
        patch.setattr(Interpreter, "_interpret_inline_mgpu_p", _inline)
        patch.setattr(gpu_callbacks, "_named_barrier", _named_barrier)
        yield


_plain_interpret = Interpreter.interpret
_plain_wgmma = Interpreter._interpret_wgmma_ref_p
_plain_load = Interpreter._interpret_copy_gmem_to_smem_p
_plain_inline = Interpreter._interpret_inline_mgpu_p


def _interpret(self: Any, jaxpr: Any, token: jax.Array, *args: Any) -> Any:
    """Evaluates equation by equation if one is a `run_state`, otherwise as before."""
    if all(eqn.primitive is not run_state_p for eqn in jaxpr.eqns):
        return _plain_interpret(self, jaxpr, token, *args)
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), args, strict=True))

    def read(variables: Any) -> list[Any]:
        return [v.val if hasattr(v, "val") else values[v] for v in variables]

    for eqn in jaxpr.eqns:
        if eqn.primitive is run_state_p:
            token, results = _run_state(self, eqn, token, read(eqn.invars))
        else:
            inputs = list(dict.fromkeys(v for v in eqn.invars if not hasattr(v, "val")))
            alone = jaxpr.replace(constvars=[], invars=inputs, eqns=[eqn], outvars=eqn.outvars)
            token, results = _plain_interpret(self, alone, token, *read(inputs))
        values.update(zip(eqn.outvars, results, strict=True))
    return token, read(jaxpr.outvars)


def _run_state(self: Any, eqn: Any, token: jax.Array, inputs: list[Any]) -> tuple[jax.Array, list[Any]]:
    """Values become buffers that the body modifies; their final contents are the results."""
    refs = []
    for variable, value in zip(eqn.invars, inputs, strict=True):
        if isinstance(variable.aval, AbstractRef):
            refs.append(value)
        else:
            token, ref = _in_registers(self, token, value, eqn.source_info)
            refs.append(ref)
    token, _ = self.interpret(eqn.params["jaxpr"], token, *refs)
    results = []
    for variable, ref in zip(eqn.invars, refs, strict=True):
        if isinstance(variable.aval, AbstractRef):
            results.append(ref)
            continue
        token, value = gpu_callbacks.call_get(
            token=token,
            result_shape_and_dtype=variable.aval,
            mesh_location=self.mesh_location,
            thread=self.thread,
            allocation_key_as_array=ref,
            transforms=(),
            source_info=eqn.source_info,
        )
        token = _free(self, token, ref, eqn.source_info)
        results.append(value)
    return token, results


def _wgmma(self: Any, eqn: Any, token: jax.Array, get_inputs: Deferred) -> Any:
    if isinstance(eqn.invars[1].aval, AbstractRef):
        return _plain_wgmma(self, eqn, token, get_inputs)
    accumulator, left, *rest = get_inputs()
    token, ref = _in_registers(self, token, left, eqn.source_info)
    token, results = _plain_wgmma(self, eqn, token, lambda: [accumulator, ref, *rest])
    return _free(self, token, ref, eqn.source_info), results


def _load(self: Any, eqn: Any, token: jax.Array, get_inputs: Deferred) -> Any:
    if not eqn.params["has_user_predicate"]:
        return _plain_load(self, eqn, token, get_inputs)
    *inputs, predicate = get_inputs()
    load = lambda token: _plain_load(self, eqn, token, lambda: inputs)[0]  # noqa: E731
    return lax.cond(predicate, load, lambda token: token, token), []


def _inline(self: Any, eqn: Any, token: jax.Array, get_inputs: Deferred) -> Any:
    if (
        eqn.params["mgpu_fn"].__qualname__ == "tcgen05_fence_after_thread_sync"
    ):  # orders operations that are ordered here anyway
        return token, []
    return _plain_inline(self, eqn, token, get_inputs)


@gpu_callbacks.fail_on_exception
def _named_barrier(
    token: Any, mesh_location: Any, thread: Any, barrier_id: Any, *, num_threads: int, sync: bool, source_info: Any
) -> Any:
    """`bar.arrive` and `bar.sync` of whole warp groups (128 threads) and single warps (32), one arrival each."""
    memory_ = gpu_callbacks._get_shared_memory()
    groups, rest = divmod(num_threads, 128)
    barrier = memory_.named_barrier(thread, int(barrier_id), groups + rest // 32)
    clock = memory_.incr_clock(thread) if memory_.detect_races else None
    logging_info = memory.GPULoggingInfo(mesh_location, thread, source_info)
    barrier.arrive(thread, clock, logging_info)
    if sync:
        barrier.wait(thread, logging_info)
    return token


def _in_registers(self: Any, token: jax.Array, value: jax.Array, source_info: Any) -> tuple[jax.Array, jax.Array]:
    token, request = gpu_callbacks.call_make_allocation_request_array(
        token=token,
        compute_unit=self.thread,
        memory_space_id=memory.get_memory_space_idx(mosaic_gpu_core.MemorySpace.REGS),
        initial_ref_count=1,
    )
    return gpu_callbacks.call_allocate_buffer(
        token=token,
        mesh_location=self.mesh_location,
        thread=self.thread,
        allocation_request_as_array=request,
        value=value,
        source_info=source_info,
    )


def _free(self: Any, token: jax.Array, ref: jax.Array, source_info: Any) -> jax.Array:
    return gpu_callbacks.call_deallocate_buffer(
        token=token,
        mesh_location=self.mesh_location,
        thread=self.thread,
        allocation_key_as_array=ref,
        source_info=source_info,
    )
