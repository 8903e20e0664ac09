"""Compares attention kernels: ours, cuDNN, XLA and, if it is installed and has kernels for the device, tokamax.

    python benchmarks/attention.py                       # [4, 1280, 40, 128] bfloat16; a small shape on a CPU
    python benchmarks/attention.py --json result.json

Rows of one document (`causal`), and rows packed with documents of log-normal length. TFLOP/s count only
visible pairs: two products forward, five backward. cuDNN does not support packing: `cudnn` is its causal attention over
whole rows (the cost of a packed row without isolation), `cudnn, mask` gets the packing as a dense mask. `flacuna_jax`
is our own kernels, `tokamax` the backend of that name, on Hopper and Blackwell. An exception of a contender is shown in
its row. Calls are queued and waited for together, so that the device is the bottleneck.
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import stand_in  # noqa: F401  # before flacuna_jax
from measure import environment_here, matmul_ceiling, print_table, write_json

from flacuna_jax.kernels import attention_tokamax
from flacuna_jax.kernels.attention import Backend, attention
from flacuna_jax.kernels.attention_reference import visible_bqk
from flacuna_jax.kernels.packed_mask import PackedMask, make_packed_mask

Arrays = tuple[jax.Array, jax.Array, jax.Array]
Contender = Callable[[jax.Array, jax.Array, jax.Array, PackedMask], jax.Array]
MEAN_DOCUMENTS = (100, 200, 320, 640)
SIGMA = 0.8
"""Spread of the logarithm of a document's length."""


class Shape(NamedTuple):
    batch: int
    length: int
    heads: int
    dim: int
    dtype: str


SHAPES = {
    "13b": Shape(4, 1280, 40, 128, "bfloat16"),
    "cpu": Shape(1, 1280, 8, 64, "float32"),
    "tiny": Shape(1, 128, 2, 16, "float32"),
}


def packed_segments(batch: int, length: int, mean: float | None, seed: int = 0) -> np.ndarray:
    """int32 [batch, length] segment ids of full rows; one document per row if `mean` is None."""
    if mean is None:
        return np.ones((batch, length), np.int32)
    rng = np.random.default_rng(seed)
    segments = np.zeros((batch, length), np.int32)
    for row in segments:
        start, number = 0, 1
        while start < length:
            size = max(8, int(rng.lognormal(math.log(mean) - SIGMA**2 / 2, SIGMA)))
            row[start : start + size] = number
            start, number = start + size, number + 1
    return segments


def visible_pairs(segments: np.ndarray) -> int:
    """Pairs of a query and a key that it sees, over the whole batch."""
    sizes = [np.unique(row[row > 0], return_counts=True)[1].astype(int) for row in segments]
    return int(sum((size * (size + 1) // 2).sum() for size in sizes))


OURS: dict[str, Backend] = {"gpu": "pallas_gpu", "tpu": "pallas_tpu", "cpu": "xla"}


def contenders(shape: Shape) -> dict[str, Contender]:
    device = jax.devices()[0]

    def dense(implementation: str, with_mask: bool) -> Contender:
        def run(q: jax.Array, k: jax.Array, v: jax.Array, mask: PackedMask) -> jax.Array:
            if not with_mask:
                return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
            visible = visible_bqk(mask)[:, None]
            return jax.nn.dot_product_attention(q, k, v, mask=visible, implementation=implementation)

        return run

    found: dict[str, Contender] = {
        "flacuna_jax": partial(attention, backend=OURS[device.platform]),
        "xla, mask": dense("xla", True),
    }
    if device.platform == "gpu":
        found |= {"cudnn": dense("cudnn", False), "cudnn, mask": dense("cudnn", True)}
    if attention_tokamax.misfit(shape.dim, shape.dtype, device.platform, device.device_kind) is None:
        found["tokamax"] = partial(attention, backend="tokamax")
    return found


def arrays(shape: Shape) -> Arrays:
    size = (shape.batch, shape.length, shape.heads, shape.dim)
    q, k, v = (jax.random.normal(jax.random.key(i), size, jnp.float32).astype(shape.dtype) for i in range(3))
    return q, k, v


def queued_seconds(call: Callable[[], Any], budget: float) -> float:
    """Seconds per call on a device that never waits for the host: the best of three queues."""
    jax.block_until_ready(call())
    begun = time.perf_counter()
    jax.block_until_ready(call())
    times = int(min(200, max(1, budget / 3 / (time.perf_counter() - begun))))
    best = math.inf
    for _ in range(3):
        begun = time.perf_counter()
        for _ in range(times):
            result = call()
        jax.block_until_ready(result)
        best = min(best, (time.perf_counter() - begun) / times)
    return best


class Passes(NamedTuple):
    """A contender's forward pass, and forward plus backward pass; each is compiled once for all packings."""

    forward: Any
    both: Any


def passes(contender: Contender) -> Passes:
    def both(q: jax.Array, k: jax.Array, v: jax.Array, mask: PackedMask) -> Any:
        o, pull = jax.vjp(partial(contender, mask=mask), q, k, v)
        return o, pull(o)

    return Passes(jax.jit(contender), jax.jit(both))


def measure(contender: Passes, inputs: Arrays, mask: PackedMask, budget: float) -> dict[str, float]:
    """Seconds of the forward pass, and of both passes."""
    return {
        "forward_seconds": queued_seconds(lambda: contender.forward(*inputs, mask), budget),
        "both_seconds": queued_seconds(lambda: contender.both(*inputs, mask), budget),
    }


def run(shape_name: str, budget: float, deadline: float = math.inf) -> dict[str, Any]:
    shape = SHAPES[shape_name]
    inputs = arrays(shape)
    ceiling = matmul_ceiling(shape.dtype, budget=1.0)
    results = []
    compared = {name: passes(contender) for name, contender in contenders(shape).items()}
    for mean in (None, *MEAN_DOCUMENTS):
        segments = packed_segments(shape.batch, shape.length, mean)
        mask = jax.jit(make_packed_mask)(jnp.asarray(segments))
        flops = 4 * visible_pairs(segments) * shape.heads * shape.dim
        for name, contender in compared.items():
            if (mean is not None and name == "cudnn") or time.monotonic() > deadline:
                continue  # the same work for every packing
            result: dict[str, Any] = {"packing": f"mean {mean}" if mean else "causal", "contender": name}
            try:
                result |= measure(contender, inputs, mask, budget)
                result["forward_flops_per_second"] = flops / result["forward_seconds"]
                result["both_flops_per_second"] = 3.5 * flops / result["both_seconds"]
            except Exception as error:  # any exception of a contender is a result
                result["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            results.append(result)
    return {"shape": shape._asdict(), "ceiling_flops_per_second": ceiling, "results": results}


HEADER = ("packing", "contender", "forward ms", "TFLOP/s", "of ceiling", "both ms", "TFLOP/s", "of ceiling")


def show(found: dict[str, Any]) -> None:
    ceiling, rows = found["ceiling_flops_per_second"], []
    for result in found["results"]:
        row = [result["packing"], result["contender"]]
        if "failed" in result:
            row += [result["failed"], *[None] * 5]
        else:
            for direction in ("forward", "both"):
                flops = result[f"{direction}_flops_per_second"]
                row += [1e3 * result[f"{direction}_seconds"], flops / 1e12, f"{100 * flops / ceiling:.1f} %"]
        rows.append(row)
    print_table(HEADER, rows)
    print(f"{found['shape']}, matmul ceiling {ceiling / 1e12:.3g} TFLOP/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="default: depends on the device")
    parser.add_argument("--budget", type=float, default=0.5, help="seconds of measurement per number")
    parser.add_argument("--seconds", type=float, default=math.inf, help="starts no new measurement after this time")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    shape = arguments.shape or ("cpu" if jax.devices()[0].platform == "cpu" else "13b")
    found = run(shape, arguments.budget, time.monotonic() + arguments.seconds)
    show(found)
    if arguments.json:
        write_json(arguments.json, {"environment": environment_here(), "attention": found})


if __name__ == "__main__":
    main()
