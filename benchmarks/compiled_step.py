"""Compiles the 13B step for absent machines, and checks its limits: memory, products, seconds to compile.

    pip install 'flacuna-jax[compilers]'          # no device is needed
    python benchmarks/compiled_step.py [cuda|tpu|all]

LLaMA-13B, rows of 1280 tokens, adapters of rank 8 on q and v with dropout 0.05, bfloat16: the trainer's own step, each
row compiled in a separate process without a cache. `products` is the number of products of a frozen projection with
activations per layer: 7 forward and 7 backward if no product is recomputed. Seconds are for lowering and compiling
together, as in the trainer; --quickly uses the lowest optimization effort, like `flacuna plan` for TPUs. The exit
status is 1 if a limit is exceeded.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import stand_in  # noqa: F401  # before flacuna_jax
from measure import child, print_table, write_json

from flacuna_jax.model.quantized import Quantization

COMPILE_SECONDS = 20.0
"""The limit for lowering and compiling together, on two cores."""


class Row(NamedTuple):
    target: str
    mesh: dict[str, int]
    rows: int
    """Rows per device and pass."""
    quantization: Quantization | None = None
    most_gb: float | None = None
    """The limit for arguments and temporaries together."""


ROWS = {
    "cuda": (
        Row("4xa6000", {"fsdp": 4}, 2, most_gb=22),
        Row("4xa6000", {"data": 4}, 2, most_gb=41),
        Row("4xa100-40gb", {"fsdp": 4}, 2),
        Row("a100-80gb", {}, 6),
        Row("h100", {}, 8),
        Row("h200", {}, 8),
        Row("h200", {}, 8, "int8_product"),
        Row("h200", {}, 8, "fp8_product"),
    ),
    "tpu": (
        Row("v4:2x2x1", {"fsdp": 4}, 2),
        Row("v5e:4x4", {"fsdp": 16}, 1),
        Row("v5p:2x2x1", {"fsdp": 4}, 2),
        Row("v6e:2x4", {"fsdp": 8}, 2),
    ),
}
LENGTH, LAYERS, HIDDEN, FEED_FORWARD = 1280, 40, 5120, 13824
PROJECTIONS = {(HIDDEN, HIDDEN), (FEED_FORWARD, HIDDEN), (HIDDEN, FEED_FORWARD)}


def compile_row(row: Row, quickly: bool) -> dict[str, Any]:
    """Compiles one row in this process and returns the results."""
    import jax

    jax.config.update("jax_platforms", "cpu")  # otherwise plugins search for devices
    from flacuna_jax.config.model import LoraConfig
    from flacuna_jax.config.run import MeshConfig
    from flacuna_jax.config.training import TrainingConfig
    from flacuna_jax.deviceless import quick_options
    from flacuna_jax.model.llama import LlamaConfig
    from flacuna_jax.model.parameters import ModelSpec
    from flacuna_jax.planning.compile import lower_step
    from flacuna_jax.planning.hlo import Program
    from flacuna_jax.planning.targets import absent_devices, parse_target
    from flacuna_jax.planning.workload import Layout, Statistics, Workload
    from flacuna_jax.training.network import NetworkConfig
    from flacuna_jax.training.step import StepConfig

    network = LlamaConfig(32000, HIDDEN, FEED_FORWARD, LAYERS, 40, 40, 128)
    spec = ModelSpec(network, LoraConfig(), "bfloat16", "bfloat16", row.quantization)
    layout = Layout(MeshConfig(**row.mesh), "dots", row.rows)
    statistics = Statistics(layout.shards * row.rows, 100, 100, 0.98, 0.3, 200, True)
    workload = Workload(StepConfig(NetworkConfig(spec)), TrainingConfig(), LENGTH, statistics)
    devices = absent_devices(parse_target(row.target))

    begun = time.monotonic()
    lowered = lower_step(workload, layout, devices)
    lowering = time.monotonic() - begun
    compiled = lowered.compile(quick_options(devices[0]) if quickly else None)
    memory: Any = compiled.memory_analysis()
    seconds = time.monotonic() - begun
    return {
        "lowering_seconds": lowering,
        "seconds": seconds,
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "together": memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        "products_per_layer": projection_products(Program(compiled.as_text() or "", trips)) / LAYERS,
    }


def trips(op_name: str) -> float:
    """Trip count of a loop that the compiler does not report: over layers within the loop over micro-batches."""
    return LAYERS if op_name.count("while") > 1 else 1


def projection_products(program: Any) -> float:
    """Number of products with a frozen projection in one micro-batch."""

    def meets_projection(use: Any) -> bool:
        operands = (use.computation.instructions[name] for name in use.instruction.operands[:2])
        return any(tuple(n for n in operand.arrays[0][1] if n > 1) in PROJECTIONS for operand in operands)

    return sum(use.times for use, _ in program.matrix_products() if meets_projection(use))


def judged(row: Row, found: dict[str, Any]) -> list[str]:
    """The limits that a row exceeds."""
    if "failed" in found:
        return [found["failed"]]
    missed = []
    if row.most_gb is not None and found["together"] > row.most_gb * 1e9:
        missed.append(f"more than {row.most_gb} GB")
    if found["products_per_layer"] != 14:
        missed.append("products")
    if found["seconds"] > COMPILE_SECONDS:
        missed.append(f"more than {COMPILE_SECONDS:.0f} s")
    return missed


HEADER = ("machine, rows per device", "mesh", "weights", "arguments GB", "temporaries GB", "together", "bar")
HEADER_AFTER = ("products", "lowered s", "compiled s", "verdict")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wanted", nargs="?", default="all", choices=(*ROWS, "all"))
    parser.add_argument("--quickly", action="store_true", help="use the lowest optimization effort")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(compile_row(Row(*json.loads(arguments.row)), arguments.quickly)))
        return 0
    results, table = [], []
    for row in [row for platform, rows in ROWS.items() if arguments.wanted in (platform, "all") for row in rows]:
        extra = ["--quickly"] if arguments.quickly else []
        found = child("compiled_step.py", "--row", json.dumps(row), *extra)
        missed = judged(row, found)
        results.append({**row._asdict(), **found, "missed": missed})
        sizes = [found[key] / 1e9 if key in found else None for key in ("arguments", "temporaries", "together")]
        mesh = " ".join(f"{axis} {size}" for axis, size in row.mesh.items()) or "one device"
        seconds = [found.get(key) for key in ("products_per_layer", "lowering_seconds", "seconds")]
        verdict = "; ".join(missed) or "good"
        of_row = [f"{row.target}, {row.rows}", mesh, row.quantization or "bfloat16", *sizes, row.most_gb]
        table.append([*of_row, *seconds, verdict])
    print_table((*HEADER, *HEADER_AFTER), table)
    if arguments.json:
        write_json(arguments.json, {"compiled_step": results})
    return int(any(result["missed"] for result in results))


if __name__ == "__main__":
    raise SystemExit(main())
