"""What `model.dtype: auto` means on the devices that are here.

GPUs and TPUs compute in bfloat16. CPUs differ: those with instructions for bfloat16 multiply it faster than float32 if
the installed release of JAX uses these instructions, and the others convert every number. So both products are timed.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from flacuna_jax.config.run import RunConfig
from flacuna_jax.kernels.products import rounded_product
from flacuna_jax.planning.calibration import describe_devices
from flacuna_jax.user_cache import user_cache
from flacuna_jax.whole_files import write_atomically

ComputeDtype = Literal["bfloat16", "float32"]
DTYPES: tuple[ComputeDtype, ...] = get_args(ComputeDtype)

FASTER = 1.2
"""A CPU computes in bfloat16 if it multiplies it this many times as fast as float32. A smaller advantage is lost in the
conversions of the other operations, which compute in float32."""
SHAPE = (256, 1024, 1024)
"""Rows, inputs and outputs of the timed products."""
SECONDS = 0.05
"""Time for both products together, after a first call of each."""


@dataclasses.dataclass(frozen=True)
class ChosenDtype:
    name: ComputeDtype
    reason: str

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def choose_dtype(devices: Sequence[jax.Device]) -> ChosenDtype:
    """The dtype for the devices of this machine. On CPUs it is measured once for each release of JAX, and kept in the
    user's cache: the next run on the same machine makes the same choice, whatever else the machine is doing."""
    if devices[0].platform != "cpu":
        return ChosenDtype("bfloat16", "auto")
    file = _cache_file(devices)
    if file.is_file():
        speed = float(json.loads(file.read_text(encoding="utf-8"))["bfloat16_over_float32"])
    else:
        speed = round(relative_speed(), 2)
        write_atomically(file, json.dumps({"bfloat16_over_float32": speed}))
    name: ComputeDtype = "bfloat16" if speed >= FASTER else "float32"
    return ChosenDtype(name, f"auto: this processor multiplies bfloat16 {speed:.3g} × as fast as float32")


def with_dtype(config: RunConfig, dtype: ComputeDtype) -> RunConfig:
    """The config with a dtype in place of `auto`."""
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": dtype})})


def relative_speed() -> float:
    """How many times as fast as a product in float32 the same product in bfloat16 is, on the default device.

    The time is that of the process on all cores, so that other programs do not count.
    """
    rows, inputs, outputs = SHAPE
    product = jax.jit(lambda x_bi, w_oi: rounded_product(x_bi, w_oi, x_bi.dtype))
    operands = {
        # From the host, so that no programs are compiled to make them.
        dtype: jax.device_put([np.full((size, inputs), 0.5, jnp.dtype(dtype)) for size in (rows, outputs)])
        for dtype in DTYPES
    }
    for pair in operands.values():
        product(*pair).block_until_ready()  # compiles
    seconds = dict.fromkeys(operands, 0.0)
    # By turns, so that a change of the clock rate affects both.
    while sum(seconds.values()) < SECONDS:
        for dtype, pair in operands.items():
            begun = time.process_time()
            product(*pair).block_until_ready()
            seconds[dtype] += time.process_time() - begun
    return seconds["float32"] / seconds["bfloat16"]


def _cache_file(devices: Sequence[jax.Device]) -> Path:
    key = hashlib.sha256(f"{describe_devices(devices)} {jax.__version__}".encode()).hexdigest()[:24]
    return user_cache() / "dtype" / f"{key}.json"
