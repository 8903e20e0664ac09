"""Compares the predictions of `flacuna plan` for the devices of this machine with measurements of the same step.

    python benchmarks/plan_accuracy.py --sizes 7b                    # on an accelerator
    python benchmarks/plan_accuracy.py --sizes 58m --length 512      # on a CPU

Random weights, adapters of rank 8 on q and v, weights split over all devices, one process per row. Prints a Markdown
table; `--json` prints the numbers.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flacuna_jax.config.schema import LoraConfig, TrainingConfig
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import ModelSpec, init_params
from flacuna_jax.model.sharding import batch_sharding, make_mesh, split_everywhere
from flacuna_jax.planning.compile import lower_step
from flacuna_jax.planning.plans import compiled_plan
from flacuna_jax.planning.targets import present_machine
from flacuna_jax.planning.workload import Layout, Statistics, Workload
from flacuna_jax.training.network import NetworkConfig
from flacuna_jax.training.state import StateLayout
from flacuna_jax.training.step import StepConfig
from flacuna_jax.verbs.plan import LLAMA_SIZES

SIZES = {"58m": LlamaConfig(32000, 512, 1376, 8, 8, 8, 64), **LLAMA_SIZES}
DOCUMENT, SUPERVISED = 256, 0.3
STEPS = 5


@dataclass(frozen=True)
class Row:
    sizes: str
    length: int
    remat: str
    micro_batch: int
    dtype: str

    def measure(self) -> dict[str, Any]:
        devices = jax.devices()
        layout = Layout(split_everywhere(devices), self.remat, self.micro_batch)
        rows = 2 * self.micro_batch * layout.shards
        spec = ModelSpec(SIZES[self.sizes], LoraConfig(), self.dtype, self.dtype)
        documents = self.length / DOCUMENT
        statistics = Statistics(rows, 1000, rows * documents, 1.0, SUPERVISED, DOCUMENT, assumed=True)
        workload = Workload(StepConfig(NetworkConfig(spec)), TrainingConfig(), self.length, statistics)
        plan = compiled_plan(workload, layout, present_machine(devices), devices)

        mesh = make_mesh(layout.mesh, devices)
        compiled = lower_step(workload, layout, devices).compile()
        state_layout = StateLayout(spec, workload.optimizer, mesh)
        before = _reset_peak()
        base = init_params(spec, spec.base, 0, mesh)
        state = state_layout.begin(state_layout.fresh_adapters(0, base))
        batch = jax.device_put(_batch(rows, self.micro_batch * layout.shards, self.length), batch_sharding(mesh))
        carry, seconds = (state.trainable, state.opt_state), []
        for step in range(STEPS + 1):
            started = time.perf_counter()
            *carry, metrics = compiled(*carry, base, batch, np.int32(step))
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - started)
        return {
            "layout": str(layout),
            "predicted_gb": plan.peak / 1e9,
            "measured_gb": (_peak() - before) / 1e9,
            "predicted_seconds": plan.time.step,
            "measured_seconds": float(np.median(seconds[1:])),
            "bound_by": plan.time.bound,
        }


def _batch(rows: int, micro_rows: int, length: int) -> dict[str, np.ndarray]:
    """Documents of one length, the last part of each supervised."""
    position = np.arange(length) % DOCUMENT
    row = {
        "tokens": np.random.default_rng(0).integers(3, 500, length).astype(np.int32),
        "targets": np.random.default_rng(1).integers(3, 500, length).astype(np.int32),
        "segment_ids": (np.arange(length) // DOCUMENT + 1).astype(np.int32),
        "positions": position.astype(np.int32),
        "loss_mask": position >= (1 - SUPERVISED) * DOCUMENT,
    }
    shape = (rows // micro_rows, micro_rows, length)
    return {name: np.ascontiguousarray(np.broadcast_to(leaf, shape)) for name, leaf in row.items()}


def _reset_peak() -> int:
    """Bytes in use before the arrays are allocated; resets the high-water mark on a CPU."""
    if jax.devices()[0].memory_stats():
        return 0
    Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak() -> int:
    """Peak memory per device; on a CPU, of the process."""
    if statistics := jax.devices()[0].memory_stats():
        return statistics["peak_bytes_in_use"]
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", choices=SIZES, default="58m")
    parser.add_argument("--length", type=int, default=1280)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--remats", default="none,dots,full")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(Row(**json.loads(arguments.row)).measure()))
        return
    measured = []
    for remat in arguments.remats.split(","):
        row = Row(arguments.sizes, arguments.length, remat, arguments.micro_batch, arguments.dtype)
        command = [sys.executable, __file__, "--row", json.dumps(vars(row))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        measured.append(json.loads(done.stdout.splitlines()[-1]))
    if arguments.json:
        print(json.dumps(measured, indent=2))
        return
    print(
        "| layout | GB predicted | GB measured | s/step predicted | s/step measured | bound by |\n"
        "|---|---|---|---|---|---|"
    )
    for m in measured:
        print(
            f"| {m['layout']} | {m['predicted_gb']:.2f} | {m['measured_gb']:.2f} | {m['predicted_seconds']:.3f} "
            f"| {m['measured_seconds']:.3f} | {m['bound_by']} |"
        )


if __name__ == "__main__":
    main()
