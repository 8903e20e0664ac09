"""Timing, the matmul ceiling, and the environment of a measurement."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def seconds_of(run: Callable[[int], Any], budget: float, least: int = 3, most: int = 50) -> list[float]:
    """Seconds of each `run(i)`, which must block until it is done, for about `budget` seconds. Warm up before."""
    spent: list[float] = []
    started = time.perf_counter()
    while len(spent) < least or (time.perf_counter() - started < budget and len(spent) < most):
        begun = time.perf_counter()
        run(len(spent))
        spent.append(time.perf_counter() - begun)
    return spent


def median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def matmul_ceiling(dtype: str, size: int | None = None, budget: float = 3.0) -> float:
    """FLOP/s of square products in `dtype` on the first device, the reference for all fractions of a ceiling.

    Several products run in one program, so that launching is not measured.
    """
    import jax
    import jax.numpy as jnp

    on_cpu = jax.devices()[0].platform == "cpu"
    size = size or (1024 if on_cpu else 8192)
    products = 4 if on_cpu else 16

    @jax.jit
    def chain(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, products, lambda _, x: (x @ w).astype(x.dtype), x)

    x = jax.random.normal(jax.random.key(0), (size, size), jnp.float32).astype(dtype)
    w = (jax.random.normal(jax.random.key(1), (size, size), jnp.float32) * size**-0.5).astype(dtype)
    jax.block_until_ready(chain(x, w))
    spent = seconds_of(lambda _: jax.block_until_ready(chain(x, w)), budget)
    return products * 2 * size**3 / min(spent)


def environment() -> dict[str, Any]:
    """The environment of a measurement: device, versions, date, but no host name.

    It is determined in a separate process, because a process that has initialized an accelerator keeps its memory.
    """
    return child("measure.py")


def environment_here() -> dict[str, Any]:
    import jax

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    packages = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "peft", "tokamax")
    return {
        "device": device_name(),
        "platform": jax.devices()[0].platform,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {package: found for package in packages if (found := version(package))},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def device_name() -> str:
    """The accelerator's kind, or the processor's model."""
    import jax

    kind = jax.devices()[0].device_kind
    if jax.devices()[0].platform != "cpu":
        return kind
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or kind
    return f"CPU {model}, {os.cpu_count()} cores"


def child(script: str, *arguments: str, timeout: float | None = None) -> dict[str, Any]:
    """Runs a benchmark in a separate process, which has exclusive use of the device, and returns the JSON in its last
    line.

    A failure of the child is a result too: {"failed": its last line}.
    """
    command = [sys.executable, str(Path(__file__).parent / script), *arguments]
    try:
        # Unfiltered, JAX's tracebacks end with the error instead of a remark about filtering.
        environment = {**os.environ, "JAX_TRACEBACK_FILTERING": "off"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {timeout:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        errors = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
        return {"failed": f"status {done.returncode}: {errors[-1][:300]}"}
    return json.loads(lines[-1])


def print_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    text = [[_cell(value) for value in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in text) for i in range(len(header))]
    for number, row in enumerate(text):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells))
        if number == 0:
            print("  ".join("-" * width for width in widths))
    sys.stdout.flush()


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Writes a temporary file and renames it, so that a reader never sees an incomplete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".writing")
    aside.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


if __name__ == "__main__":
    print(json.dumps(environment_here()))
