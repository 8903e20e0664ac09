"""Finds the fastest tiles of the attention kernels on the device of this machine, and writes them to the table.

    python benchmarks/tune_attention.py                       # prints the best tiles, and those in the table
    python benchmarks/tune_attention.py --write               # also writes them to the package's tiles_measured.json
    python benchmarks/tune_attention.py --accept benchmarks/results/nvidia-h200-2026-01-01.json   # of another machine

If there is another backend for the device (tokamax, on Hopper and Blackwell), forward and backward of both are timed on
the same rows, and recorded in the table; `attention: auto` selects the faster one.

Forward, dq and dk/dv are timed separately, on packed rows [4, 1280, 40, head_dim] in bfloat16 with documents of 200
tokens on average. Candidates that do not compile (shared memory) are skipped and counted. On a CPU the kernels run
interpreted, on a tiny shape with two candidates: this shows that the tuner works, not which tile is fast.
"""

import argparse
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import stand_in  # noqa: F401  # before flacuna_jax
from attention import packed_segments, queued_seconds
from measure import environment_here, print_table, write_json

from flacuna_jax.kernels import attention_gpu, attention_tokamax, attention_tpu
from flacuna_jax.kernels.packed_mask import make_packed_mask
from flacuna_jax.kernels.tiles import MEASURED, GpuTile, GpuTiles, TpuTile, gpu_tiles, tpu_tiles

KERNELS = ("forward", "dq", "dkv")
MEAN_DOCUMENT = 200
COMPILING_THREADS = 8


def candidates(platform: str, kernel: str) -> Iterator[GpuTile | TpuTile]:
    if platform == "tpu":
        yield from (TpuTile(queries, keys) for queries, keys in itertools.product((128, 256, 512), repeat=2))
    elif platform == "cpu":
        yield from (GpuTile(16, 16, 4, 1), GpuTile(32, 16, 4, 1))
    else:
        sides = {"forward": ((64, 128), (32, 64, 128)), "dq": ((64, 128), (32, 64)), "dkv": ((32, 64), (64, 128))}
        for (queries, keys), warps, stages in itertools.product(itertools.product(*sides[kernel]), (4, 8), (2, 3)):
            if queries * keys <= 8192 or warps == 8:  # four warps do not have enough registers for more scores
                yield GpuTile(queries, keys, warps, stages)


class Tuner:
    """Inputs of one head_dim, and the time of a kernel with a given tile."""

    def __init__(self, dim: int, budget: float) -> None:
        self.platform, self.budget = jax.devices()[0].platform, budget
        cpu = self.platform == "cpu"
        batch, length, heads = (1, 64, 2) if cpu else (4, 1280, 40)
        self.start: Any = (tpu_tiles if self.platform == "tpu" else gpu_tiles)(
            jax.devices()[0].device_kind, dim, "bfloat16"
        )
        self.module: Any = attention_tpu if self.platform == "tpu" else attention_gpu
        if cpu:
            self.start = type(self.start)(*[GpuTile(16, 16, 4, 1)] * 3)
        shape = (batch, length, heads, dim)
        q, k, v, do = (jax.random.normal(jax.random.key(i), shape, jnp.float32).astype("bfloat16") for i in range(4))
        mask = make_packed_mask(jnp.asarray(packed_segments(batch, length, MEAN_DOCUMENT)))
        self.options = {"scale": dim**-0.5, "interpret": cpu}
        o, lse = self.module.forward(q, k, v, mask, tiles=self.start, **self.options)
        self.forward_inputs, self.backward_inputs = (q, k, v, mask), (q, k, v, mask, o, lse, do)
        self.dim = dim

    def compiled(self, kernel: str, tile: Any) -> Callable[[], Any] | None:
        """The kernel's direction with this tile and the tiles in the table for the other kernels; None if it does not
        compile.

        The other backward kernel is removed as dead code: dk and dv are not used when dq is tuned.
        """
        tiles = dataclasses.replace(self.start, **{kernel: tile})

        def call(*inputs: Any) -> Any:
            direction = self.module.forward if kernel == "forward" else self.module.backward
            results = direction(*inputs, tiles=tiles, **self.options)
            return {"forward": results, "dq": results[0], "dkv": results[1:]}[kernel]

        inputs = self.forward_inputs if kernel == "forward" else self.backward_inputs
        try:
            return partial(jax.jit(call).lower(*inputs).compile(), *inputs)
        except (jax.errors.JaxRuntimeError, ValueError):
            return None

    def times(self, kernel: str) -> dict[Any, float | None]:
        """Seconds of every candidate; None for those that do not fit the hardware."""
        tiles = list(dict.fromkeys([getattr(self.start, kernel), *candidates(self.platform, kernel)]))
        with ThreadPoolExecutor(COMPILING_THREADS) as pool:
            calls = list(pool.map(partial(self.compiled, kernel), tiles))
        return {
            tile: None if call is None else queued_seconds(call, self.budget)
            for tile, call in zip(tiles, calls, strict=True)
        }

    def backends(self, best: dict[str, Any]) -> dict[str, float]:
        """Seconds of forward and backward, with our best tiles and with tokamax; empty without another backend."""
        kind = jax.devices()[0].device_kind
        if attention_tokamax.misfit(self.dim, "bfloat16", self.platform, kind) is not None:
            return {}
        ours = {"tiles": GpuTiles(**{kernel: GpuTile(**tile) for kernel, tile in best.items()})}
        rivals: dict[str, tuple[Any, dict[str, Any]]] = {
            "pallas_gpu": (attention_gpu, ours),
            "tokamax": (attention_tokamax, {"device_kind": kind}),
        }
        *inputs, _, _, do = self.backward_inputs

        def both(module: Any, options: dict[str, Any], *inputs: Any) -> Any:
            *arrays, do = inputs
            o, lse = module.forward(*arrays, **options)
            return o, module.backward(*arrays, o, lse, do, **options)

        seconds = {}
        for name, (module, options) in rivals.items():
            call = jax.jit(partial(both, module, options | {"scale": self.options["scale"]}))
            seconds[name] = queued_seconds(partial(call, *inputs, do), self.budget)
        return seconds


def tune(dims: tuple[int, ...], budget: float, deadline: float = math.inf) -> dict[str, Any]:
    """The best tile of each kernel by head_dim, and all times."""
    found: dict[str, Any] = {"device_kind": jax.devices()[0].device_kind, "dims": {}}
    for dim in dims:
        if time.monotonic() > deadline:
            break
        tuner, best, timed = Tuner(dim, budget), {}, []
        for kernel in KERNELS:
            times = tuner.times(kernel)
            held = {tile: seconds for tile, seconds in times.items() if seconds is not None}
            best[kernel] = dataclasses.asdict(min(held, key=lambda tile: held[tile]))
            start = getattr(tuner.start, kernel)
            timed += [
                {"kernel": kernel, "tile": dataclasses.asdict(tile), "seconds": seconds, "in_table": tile == start}
                for tile, seconds in times.items()
            ]
        found["dims"][str(dim)] = {"best": best, "timed": timed, "seconds": tuner.backends(best)}
    return found


def show(found: dict[str, Any]) -> None:
    rows = []
    for dim, of_dim in found["dims"].items():
        for kernel in KERNELS:
            timed = [entry for entry in of_dim["timed"] if entry["kernel"] == kernel]
            held = sorted((entry for entry in timed if entry["seconds"]), key=lambda entry: entry["seconds"])
            now = next(entry["seconds"] for entry in timed if entry["in_table"])
            tile = " ".join(f"{name} {value}" for name, value in held[0]["tile"].items())
            rows.append(
                [dim, kernel, tile, 1e6 * held[0]["seconds"], now and 1e6 * now, len(timed), len(timed) - len(held)]
            )
    print_table(("head_dim", "kernel", "best", "µs", "table's µs", "tried", "refused"), rows)
    for dim, of_dim in found["dims"].items():
        if times := of_dim["seconds"]:
            print(f"head_dim {dim}, both passes: " + ", ".join(f"{name} {1e6 * s:.0f} µs" for name, s in times.items()))


def accept(found: dict[str, Any]) -> None:
    """Writes the best tiles to the table of the package."""
    table = json.loads(MEASURED.read_text(encoding="utf-8"))
    entry = table.setdefault(found["device_kind"], {})
    for dim, of_dim in found["dims"].items():
        entry[dim] = of_dim["best"] | ({"seconds": of_dim["seconds"]} if of_dim.get("seconds") else {})
    write_json(MEASURED, table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 64], help="head_dims to tune for")
    parser.add_argument("--budget", type=float, default=0.15, help="seconds of measurement per candidate")
    parser.add_argument("--seconds", type=float, default=math.inf, help="starts no other head_dim after this time")
    parser.add_argument("--write", action="store_true", help="write the table of this package")
    parser.add_argument("--accept", type=Path, help="write it from a result of another machine, without timing")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    if arguments.accept:
        accept(json.loads(arguments.accept.read_text(encoding="utf-8"))["tiles"])
        return
    found = tune(tuple(arguments.dims), arguments.budget, time.monotonic() + arguments.seconds)
    show(found)
    if arguments.write:
        accept(found)
    if arguments.json:
        write_json(arguments.json, {"environment": environment_here(), "tiles": found})


if __name__ == "__main__":
    main()
