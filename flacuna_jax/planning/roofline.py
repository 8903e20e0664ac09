"""Estimates the time of a step: arithmetic, memory traffic and communication, each at the rate of the hardware.

On calibrated devices, the seconds of arithmetic and memory are those of `calibration.Factors`. Elsewhere, peak rates
are scaled by the fraction that good programs reach, which is an assumption (docs/results/performance.md has
measurements).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from flacuna_jax.planning.estimate import Work
from flacuna_jax.planning.hlo import Collective
from flacuna_jax.planning.targets import Machine

MATRIX_SHARE = {"cuda": 0.62, "tpu": 0.75, "cpu": 0.75}
"""Fraction of the dense bfloat16 peak in large matrix products. 0.62 of an A6000 is 95 TFLOP/s."""
MEMORY_SHARE = 0.8
LINK_SHARE = {"PCIe 4": 0.62, "NVLink 3": 0.75, "NVLink 4": 0.75, "ICI": 0.8, "memory": 0.5}
NETWORK_SHARE = 0.75
LATENCY = 20e-6
"""Latency of a collective in seconds."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    compute: float
    memory: float
    overhead: float
    """Seconds of a step, whatever its size; 0 if the devices are not calibrated."""
    links: dict[str, float]
    """Seconds of communication by link, overlapped or not."""
    exposed: float
    """Seconds of communication that is not overlapped."""
    step: float
    bound: str
    """The part that takes most of the step's time."""


def step_time(work: Work, machine: Machine, dtype: str) -> StepTime:
    """The time of a step that computes in a dtype."""
    factors = machine.calibration and machine.calibration.factors.get(dtype)
    if factors:
        compute = work.flops * factors.seconds_per_flop
        memory = work.memory_traffic * factors.seconds_per_byte
        overhead = factors.overhead
        own = compute + memory + overhead
    else:
        target = machine.target
        compute = work.flops / (target.bf16_flops * MATRIX_SHARE[target.platform])
        memory = work.memory_traffic / (target.memory_bandwidth * MEMORY_SHARE)
        overhead = 0.0
        own = max(compute, memory)
    links: dict[str, float] = {}
    overlapped = exposed = 0.0
    for collective in work.collectives:
        link, seconds = exchange_time(collective, machine)
        links[link] = links.get(link, 0.0) + seconds
        if collective.overlapped:
            overlapped += seconds
        else:
            exposed += seconds
    parts = {"arithmetic": compute, "device memory": memory, "overhead": overhead, **links}
    return StepTime(
        compute=compute,
        memory=memory,
        overhead=overhead,
        links=links,
        exposed=exposed,
        step=max(own, overlapped) + exposed,
        bound=max(parts, key=lambda part: parts[part]),
    )


def exchange_time(collective: Collective, machine: Machine) -> tuple[str, float]:
    """(link that limits it, seconds of all its runs). With rings, the ports of a host share the traffic to other
    hosts."""
    target = machine.target
    local = collective.received / (target.link_bandwidth * LINK_SHARE[target.link])
    hosts = Counter(position // machine.devices_per_host for position in collective.group)
    remote = 0.0
    if len(hosts) > 1:
        per_host = collective.nbytes * (len(hosts) - 1) / len(hosts) * (2 if collective.kind == "all-reduce" else 1)
        remote = per_host / (min(hosts.values()) * target.network_bandwidth * NETWORK_SHARE)
    link = "network" if remote > local else target.link
    return link, collective.times * (max(local, remote) + LATENCY)


def summarise(collectives: Sequence[Collective], machine: Machine) -> list[dict[str, str | float]]:
    """Collectives of a step by kind and link: number, bytes received per device, seconds."""
    rows: dict[tuple[str, str], dict[str, str | float]] = {}
    for collective in collectives:
        link, seconds = exchange_time(collective, machine)
        row = rows.setdefault(
            (collective.kind, link),
            {"kind": collective.kind, "link": link, "count": 0, "bytes": 0.0, "seconds": 0.0, "exposed_seconds": 0.0},
        )
        for key, value in (
            ("count", collective.times),
            ("bytes", collective.times * collective.received),
            ("seconds", seconds),
            ("exposed_seconds", 0.0 if collective.overlapped else seconds),
        ):
            row[key] = float(row[key]) + value
    return sorted(rows.values(), key=lambda row: -float(row["seconds"]))
