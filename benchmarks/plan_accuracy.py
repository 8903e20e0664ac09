"""Compares the predictions of `flacuna plan` for the devices of this machine with measurements of the same step.

    python benchmarks/plan_accuracy.py --sizes 7b                    # on an accelerator
    python benchmarks/plan_accuracy.py --sizes 58m --length 512      # on a CPU
    python benchmarks/plan_accuracy.py --sizes tiny --length 64 --remats dots

Random weights, adapters of rank 8 on q and v, weights split over all devices, one process per row. None of the sizes is
one that `flacuna plan --calibrate` measures. Prints a Markdown table; `--json` prints the numbers.
"""

import argparse
import json
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.planning.measure import Case, step_seconds
from flacuna_jax.planning.plans import compiled_plan
from flacuna_jax.planning.targets import present_machine
from flacuna_jax.verbs.plan import LLAMA_SIZES

SIZES = {
    "tiny": LlamaConfig(512, 64, 128, 2, 4, 4, 16),
    "58m": LlamaConfig(32000, 512, 1376, 8, 8, 8, 64),
    **LLAMA_SIZES,
}


@dataclass(frozen=True)
class Row:
    sizes: str
    length: int
    remat: str
    micro_batch: int
    dtype: str

    def measure(self) -> dict[str, Any]:
        case = Case(SIZES[self.sizes], self.length, self.micro_batch, self.dtype, self.remat)
        plan = compiled_plan(case.workload, case.layout, present_machine(jax.devices()), jax.devices())
        before: list[int] = []
        measured = float(np.median(step_seconds(case, lambda: before.append(_reset_peak()))))
        return {
            "layout": str(case.layout),
            "predicted_gb": plan.peak / 1e9,
            "measured_gb": (_peak() - before[0]) / 1e9,
            "predicted_seconds": plan.time.step,
            "measured_seconds": measured,
            "ratio": plan.time.step / measured,
            "bound_by": plan.time.bound,
            "origin": plan.origin_of_seconds,
        }


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
        "| layout | GB predicted | GB measured | s/step predicted | s/step measured | ratio | bound by |\n"
        "|---|---|---|---|---|---|---|"
    )
    for m in measured:
        print(
            f"| {m['layout']} | {m['predicted_gb']:.2f} | {m['measured_gb']:.2f} | {m['predicted_seconds']:.3f} "
            f"| {m['measured_seconds']:.3f} | {m['ratio']:.2f} | {m['bound_by']} |"
        )
    print(f"\nSeconds predicted: {measured[0]['origin']}.")


if __name__ == "__main__":
    main()
