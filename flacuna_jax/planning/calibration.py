"""How fast the devices of this machine are: factors fitted to measured steps (`measure.py`), kept in the user's cache.

The seconds of a step are `seconds_per_flop` x FLOPs + `seconds_per_byte` x bytes through device memory + `overhead`.
"""

import dataclasses
import datetime
import hashlib
import itertools
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from flacuna_jax.user_cache import user_cache
from flacuna_jax.version import __version__
from flacuna_jax.whole_files import write_atomically


@dataclasses.dataclass(frozen=True)
class Factors:
    """Of one device, for one dtype of the computation."""

    seconds_per_flop: float
    seconds_per_byte: float
    overhead: float
    """Seconds of a step, whatever its size."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """A step that was executed: its work on each device, and its seconds."""

    name: str
    flops: float
    memory_traffic: float
    """Bytes."""
    seconds: float

    def predicted(self, factors: Factors) -> float:
        """Seconds by the factors."""
        work = self.flops * factors.seconds_per_flop + self.memory_traffic * factors.seconds_per_byte
        return work + factors.overhead


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Factors of the devices of one machine, and where they come from."""

    date: str
    devices: str
    jax: str
    flacuna: str
    factors: Mapping[str, Factors]
    """By dtype."""

    @property
    def origin(self) -> str:
        return f"calibrated on {self.date} on {self.devices} with jax {self.jax}"


def fit(measured: Sequence[Measured]) -> Factors:
    """Least squares of the relative errors; no factor is negative.

    Args:
      measured: at least three steps, with different ratios of FLOPs and bytes.
    """
    seconds = np.array([one.seconds for one in measured])
    terms = np.array([[one.flops, one.memory_traffic, 1.0] for one in measured]) / seconds[:, None]
    scale = terms.max(axis=0)
    fits = [
        _fit_some(terms / scale, list(some)) for size in (1, 2, 3) for some in itertools.combinations(range(3), size)
    ]
    _, best = min((fit for fit in fits if fit[1].min() >= 0), key=lambda fit: fit[0])
    return Factors(*(float(value) for value in best / scale))


def _fit_some(terms: np.ndarray, some: list[int]) -> tuple[float, np.ndarray]:
    """Least squares with only some of the terms, whose sum should be 1: the sum of squares, and all three factors. The
    best of these without a negative factor is the best without one of all."""
    factors = np.zeros(3)
    factors[some] = np.linalg.lstsq(terms[:, some], np.ones(len(terms)))[0]
    return float(np.square(terms @ factors - 1).sum()), factors


def describe_devices(devices: Sequence[jax.Device]) -> str:
    """Number and kind of devices, for a CPU with its model and its cores."""
    first = devices[0]
    kind = first.device_kind
    if first.platform == "cpu":
        kind = f"CPU ({_cpu_model()}, {os.cpu_count()} cores)"
    return f"{len(devices)} x {kind}"


def new_calibration(devices: Sequence[jax.Device], measured: Mapping[str, Sequence[Measured]]) -> Calibration:
    """Fits measurements of today, by dtype."""
    today = datetime.date.today().isoformat()
    factors = {dtype: fit(steps) for dtype, steps in measured.items()}
    return Calibration(today, describe_devices(devices), jax.__version__, __version__, factors)


def write_calibration(calibration: Calibration) -> Path:
    """Keeps it in the user's cache, in place of an earlier one for the same devices and release of JAX."""
    file = _file(calibration.devices, calibration.jax)
    write_atomically(file, json.dumps(dataclasses.asdict(calibration), indent=1))
    return file


def read_calibration(devices: Sequence[jax.Device]) -> Calibration | None:
    """That of these devices with this release of JAX; None if they were not calibrated."""
    file = _file(describe_devices(devices), jax.__version__)
    if not file.is_file():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    return Calibration(**{**found, "factors": {name: Factors(**one) for name, one in found["factors"].items()}})


def _file(devices: str, release: str) -> Path:
    key = hashlib.sha256(f"{devices} {release}".encode()).hexdigest()[:24]
    return user_cache() / "calibration" / f"{key}.json"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
