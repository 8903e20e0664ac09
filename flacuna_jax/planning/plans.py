"""A plan: memory and time of one layout on one machine, compiled or estimated, and whether it fits."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from flacuna_jax.config.run import MeshConfig
from flacuna_jax.planning.compile import OutOfMemory, Refused, compile_step
from flacuna_jax.planning.estimate import Work, argument_bytes, estimate_work, temporary_bytes
from flacuna_jax.planning.roofline import StepTime, step_time, summarise
from flacuna_jax.planning.targets import Machine
from flacuna_jax.planning.workload import Layout, Workload

UNCALIBRATED = "UNCALIBRATED: peak rates times assumed fractions; `flacuna plan --calibrate` measures devices"


@dataclass(frozen=True)
class Plan:
    """One layout of a workload on a machine. Bytes, FLOPs and seconds are per device and optimizer step."""

    layout: Layout
    machine: Machine
    workload: Workload
    arguments: dict[str, int]
    """Bytes by kind."""
    temporaries: int
    peak: int
    work: Work
    time: StepTime
    compiled: bool
    """False: estimated from the sizes, without a compiler."""
    compile_seconds: float = 0.0
    refused: str = ""
    """Why the compiler failed; "" if it succeeded or was not used."""

    @property
    def name(self) -> str:
        base = self.workload.spec.quantization
        return f"{self.layout}, base {base}" if base else str(self.layout)

    @property
    def source(self) -> str:
        """The origin of the numbers, as text."""
        if self.compiled:
            return "compiled"
        if self.refused:
            return "ESTIMATED from the sizes, because the compiler failed"
        return "ESTIMATED from the sizes, not compiled"

    @property
    def origin_of_seconds(self) -> str:
        """Where the rates behind the seconds come from, as text."""
        calibration = self.machine.calibration
        if calibration is None or self.workload.spec.dtype not in calibration.factors:
            return UNCALIBRATED
        return calibration.origin

    @property
    def headroom(self) -> int:
        return self.machine.usable_memory - self.peak

    @property
    def fits(self) -> bool:
        return self.headroom >= 0

    @property
    def hours(self) -> float | None:
        steps = self.workload.statistics.steps
        return None if steps is None else steps * self.time.step / 3600

    def cost(self, price: float | None) -> float | None:
        """Cost of the run, at `price` per device and hour."""
        return None if price is None or self.hours is None else self.hours * self.machine.devices * price

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of the whole machine, without padding."""
        statistics = self.workload.statistics
        return statistics.rows_per_step * self.workload.length * statistics.fill / self.time.step

    def to_json(self, price: float | None = None) -> dict[str, Any]:
        statistics = self.workload.statistics
        return {
            "machine": self.machine.description,
            "devices": self.machine.devices,
            "mesh": self.layout.mesh.model_dump(),
            "remat": self.layout.remat,
            "dtype": self.workload.spec.dtype,
            "quantization": self.workload.spec.quantization,
            "micro_batch_size": self.layout.micro_batch,
            "micro_batches": self.workload.micro_batches(self.layout),
            "source": "compiled" if self.compiled else "estimated",
            "compile_seconds": round(self.compile_seconds, 2),
            "refused": self.refused or None,
            "memory": {
                "arguments": sum(self.arguments.values()),
                "arguments_by_kind": self.arguments,
                "temporaries": self.temporaries,
                "peak": self.peak,
                "usable": self.machine.usable_memory,
                "capacity": self.machine.target.memory,
                "headroom": self.headroom,
            },
            "fits": self.fits,
            "flops": self.work.flops,
            "attention_flops": self.work.attention_flops,
            "hbm_bytes": self.work.memory_traffic,
            "collectives": summarise(self.work.collectives, self.machine),
            "seconds": {
                "arithmetic": self.time.compute,
                "device_memory": self.time.memory,
                "overhead": self.time.overhead,
                "links": self.time.links,
                "exposed_exchanges": self.time.exposed,
                "step": self.time.step,
                "origin": self.origin_of_seconds,
            },
            "bound_by": self.time.bound,
            "data": {
                "assumed": statistics.assumed,
                "rows_per_step": statistics.rows_per_step,
                "examples_per_step": statistics.examples_per_step,
                "fill": statistics.fill,
            },
            "steps": statistics.steps,
            "hours": self.hours,
            "tokens_per_second": self.tokens_per_second,
            "cost": self.cost(price),
        }


def estimated_plan(workload: Workload, layout: Layout, machine: Machine) -> Plan:
    """A plan estimated from the sizes, which takes milliseconds."""
    arguments, temporaries = argument_bytes(workload, layout), temporary_bytes(workload, layout)
    work = estimate_work(workload, layout)
    return Plan(
        layout=layout,
        machine=machine,
        workload=workload,
        arguments=arguments,
        temporaries=temporaries,
        peak=sum(arguments.values()) + temporaries,
        work=work,
        time=step_time(work, machine, workload.spec.dtype),
        compiled=False,
    )


def compiled_plan(workload: Workload, layout: Layout, machine: Machine, devices: Sequence[jax.Device]) -> Plan:
    """A plan from the compiler of the hardware.

    If the compiler runs out of memory, the plan's memory is taken from its message. If it fails for another reason, the
    plan is the estimate, with that reason.
    """
    estimated = estimated_plan(workload, layout, machine)
    result = compile_step(workload, layout, devices)
    if isinstance(result, Refused):
        return replace(estimated, refused=result.reason, compile_seconds=result.seconds)
    if isinstance(result, OutOfMemory):
        peak = max(result.peak or estimated.peak, machine.usable_memory + 1)
        temporaries = peak - sum(estimated.arguments.values())
        return replace(estimated, peak=peak, temporaries=temporaries, compiled=True, compile_seconds=result.seconds)
    return Plan(
        layout=layout,
        machine=machine,
        workload=workload,
        arguments=_with_the_rest(estimated.arguments, result.arguments),
        temporaries=result.peak - result.arguments,
        peak=result.peak,
        work=result.work,
        time=step_time(result.work, machine, workload.spec.dtype),
        compiled=True,
        compile_seconds=result.seconds,
    )


def _with_the_rest(kinds: dict[str, int], total: int) -> dict[str, int]:
    """Adds the difference to the compiler's total (counters, padding of layouts), so that the kinds sum up to it."""
    rest = total - sum(kinds.values())
    return {**kinds, "other": rest} if rest > 0 else kinds


def default_layout(mesh: MeshConfig | str, remat: str, micro_batch: int, machine: Machine) -> Layout:
    """The layout of the config; `auto` is resolved as in the trainer without a search."""
    if not isinstance(mesh, MeshConfig):
        replica = machine.hosts if machine.target.platform == "tpu" else 1
        mesh = MeshConfig(replica=replica, fsdp=machine.devices // replica)
    return Layout(mesh, "dots" if remat == "auto" else remat, micro_batch)
