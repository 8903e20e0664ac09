"""Executes the trainer's step with random weights on the devices that are here, to compare it with its plan."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.config.training import TrainingConfig
from flacuna_jax.errors import UserError
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import ModelSpec, init_params
from flacuna_jax.model.sharding import batch_sharding, make_mesh, split_everywhere
from flacuna_jax.planning.calibration import Measured
from flacuna_jax.planning.compile import CompiledStep, compile_step, lower_step
from flacuna_jax.planning.workload import Layout, Statistics, Workload
from flacuna_jax.training.network import NetworkConfig
from flacuna_jax.training.state import StateLayout
from flacuna_jax.training.step import StepConfig

DTYPES = ("bfloat16", "float32")
DOCUMENT, SUPERVISED = 256, 0.3
"""Tokens of a document, and the fraction of them with loss."""
STEPS = 4


@dataclass(frozen=True)
class Case:
    """A step to measure: adapters of rank 8 on q and v, two micro-batches, weights split over all devices."""

    sizes: LlamaConfig
    length: int
    micro_batch: int
    dtype: str
    remat: str = "dots"

    @property
    def workload(self) -> Workload:
        rows = 2 * self.micro_batch * self.layout.shards
        spec = ModelSpec(self.sizes, LoraConfig(), self.dtype, self.dtype)
        documents = max(1.0, self.length / DOCUMENT)
        statistics = Statistics(rows, 1000, rows * documents, 1.0, SUPERVISED, self.length / documents, assumed=True)
        return Workload(StepConfig(NetworkConfig(spec)), TrainingConfig(), self.length, statistics)

    @property
    def layout(self) -> Layout:
        return Layout(split_everywhere(jax.devices()), self.remat, self.micro_batch)

    def __str__(self) -> str:
        sizes = self.sizes
        return f"{sizes.num_layers} layers of {sizes.hidden_size}, {self.length} tokens, {self.dtype}"


_CPU_SIZES = (
    (LlamaConfig(8000, 256, 688, 2, 4, 4, 64), 128, 1),
    (LlamaConfig(8000, 256, 688, 8, 4, 4, 64), 512, 2),
    (LlamaConfig(32000, 512, 1376, 2, 8, 8, 64), 256, 2),
    (LlamaConfig(16000, 768, 2048, 4, 12, 12, 64), 256, 1),
)
_ACCELERATOR_SIZES = (
    (LlamaConfig(32000, 1024, 2816, 4, 16, 16, 64), 1024, 1),
    (LlamaConfig(32000, 2048, 5632, 8, 16, 16, 128), 2048, 1),
    (LlamaConfig(32000, 2048, 5632, 4, 16, 16, 128), 2048, 4),
    (LlamaConfig(32000, 4096, 11008, 4, 32, 32, 128), 1024, 2),
)
"""LLaMAs with little and much arithmetic per byte, with the length and the rows of a micro-batch."""


def calibration_cases() -> list[Case]:
    """The steps that a calibration measures on the devices of this machine."""
    sizes = _CPU_SIZES if jax.devices()[0].platform == "cpu" else _ACCELERATOR_SIZES
    return [Case(*size, dtype) for dtype in DTYPES for size in sizes]


def measure_cases(cases: Sequence[Case], say: Callable[[str], None]) -> dict[str, list[Measured]]:
    """Measured steps by dtype. Raises UserError if a step cannot be compiled here."""
    measured: dict[str, list[Measured]] = {}
    for case in cases:
        compiled = compile_step(case.workload, case.layout, jax.devices())
        if not isinstance(compiled, CompiledStep):
            raise UserError(f"the step of {case} cannot be compiled here: {compiled}")
        seconds = float(np.median(step_seconds(case)))
        work = compiled.work
        measured.setdefault(case.dtype, []).append(Measured(str(case), work.flops, work.memory_traffic, seconds))
        say(f"measured {case}: {seconds:.3f} s per step")
    return measured


def step_seconds(case: Case, on_start: Callable[[], None] = lambda: None) -> list[float]:
    """Seconds of a few steps; the first, which is slower, is not counted.

    Args:
      on_start: called before arrays are allocated.
    """
    workload, layout, devices = case.workload, case.layout, jax.devices()
    mesh = make_mesh(layout.mesh, devices)
    compiled = lower_step(workload, layout, devices).compile()
    on_start()
    spec, state_layout = workload.spec, StateLayout(workload.spec, workload.optimizer, mesh)
    base = init_params(spec, spec.base, 0, mesh)
    state = state_layout.begin(state_layout.fresh_adapters(0, base))
    batch = jax.device_put(_batch(workload, layout), batch_sharding(mesh))
    carry, seconds = (state.trainable, state.opt_state), []
    for step in range(STEPS + 1):
        started = time.perf_counter()
        *carry, metrics = compiled(*carry, base, batch, np.int32(step))
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def _batch(workload: Workload, layout: Layout) -> dict[str, np.ndarray]:
    """Documents of one length, the last part of each supervised."""
    length = workload.length
    position = np.arange(length) % DOCUMENT
    row = {
        "tokens": np.random.default_rng(0).integers(3, 500, length).astype(np.int32),
        "targets": np.random.default_rng(1).integers(3, 500, length).astype(np.int32),
        "segment_ids": (np.arange(length) // DOCUMENT + 1).astype(np.int32),
        "positions": position.astype(np.int32),
        "loss_mask": position >= (1 - SUPERVISED) * min(DOCUMENT, length),
    }
    shape = (workload.micro_batches(layout), layout.micro_batch * layout.shards, length)
    return {name: np.ascontiguousarray(np.broadcast_to(leaf, shape)) for name, leaf in row.items()}
