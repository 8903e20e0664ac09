"""Times of a step from its counts."""

import dataclasses

import pytest

from flacuna_jax.planning.estimate import Work
from flacuna_jax.planning.hlo import Collective
from flacuna_jax.planning.roofline import LATENCY, LINK_SHARE, MATRIX_SHARE, NETWORK_SHARE, exchange_time, step_time
from flacuna_jax.planning.targets import parse_target

GATHER = Collective("all-gather", 8_000_000_000, tuple(range(8)), 2, False, "")


def test_a_ring_within_a_host_is_limited_by_its_link():
    link, seconds = exchange_time(GATHER, parse_target("8xH100"))
    assert link == "NVLink 4"
    assert seconds == pytest.approx(2 * (7e9 / (450e9 * LINK_SHARE["NVLink 4"]) + LATENCY))


def test_a_ring_across_hosts_shares_the_ports_of_a_host():
    across = dataclasses.replace(GATHER, group=tuple(range(128)))
    link, seconds = exchange_time(across, parse_target("16x8xH100"))
    assert link == "network"
    # Fifteen sixteenths of the array come from other hosts, through eight ports.
    assert seconds == pytest.approx(2 * (7.5e9 / (8 * 50e9 * NETWORK_SHARE) + LATENCY))
    one_of_each = dataclasses.replace(GATHER, group=(0, 8))
    assert exchange_time(one_of_each, parse_target("2x8xH100"))[1] == pytest.approx(
        2 * (4e9 / (50e9 * NETWORK_SHARE) + LATENCY)
    )


def test_overlapped_communication_costs_only_the_excess():
    machine = parse_target("4xA6000")
    second = 154.8e12 * MATRIX_SHARE["cuda"]
    exchange = Collective("all-gather", int(32e9 * LINK_SHARE["PCIe 4"] * 4 / 3), (0, 1, 2, 3), 1, False, "")
    alone = step_time(Work(2 * second, 0, 0, [exchange]), machine, "bfloat16")
    assert alone.step == pytest.approx(3, rel=1e-3)
    assert alone.bound == "arithmetic"
    hidden = step_time(Work(2 * second, 0, 0, [dataclasses.replace(exchange, overlapped=True)]), machine, "bfloat16")
    assert hidden.step == pytest.approx(2, rel=1e-3)
    link_bound = step_time(Work(0.5 * second, 0, 0, [exchange]), machine, "bfloat16")
    assert link_bound.bound == "PCIe 4"
