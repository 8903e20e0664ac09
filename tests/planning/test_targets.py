"""Names of machines and their facts."""

import pytest

from flacuna_jax.errors import UserError
from flacuna_jax.planning.targets import TARGETS, gpu_target_config, parse_target


@pytest.mark.parametrize(
    ("text", "kind", "hosts", "per_host", "torus"),
    [
        ("4xA6000", "NVIDIA RTX A6000", 1, 4, ()),
        ("16x8xH100", "NVIDIA H100 80GB HBM3", 16, 8, ()),
        ("a100", "NVIDIA A100-SXM4-80GB", 1, 1, ()),
        ("T4", "Tesla T4", 1, 1, ()),
        ("v5p:4x4x8", "TPU v5", 1, 128, (4, 4, 8)),
        ("v5e:16x16", "TPU v5 lite", 1, 256, (16, 16)),
        ("2xv5e:16x16", "TPU v5 lite", 2, 256, (16, 16)),
        ("8 x v6e", "TPU v6 lite", 1, 8, ()),
    ],
)
def test_targets_are_read(text, kind, hosts, per_host, torus):
    machine = parse_target(text)
    assert (machine.target.device_kind, machine.hosts, machine.devices_per_host) == (kind, hosts, per_host)
    assert machine.torus == torus


@pytest.mark.parametrize("text", ["4xA7000", "0xH100", "v5p:4x4", "h100:4x4", "2x2xv5p:4x4x4", "", "4x"])
def test_mistakes_name_the_input(text):
    with pytest.raises(UserError, match="target"):
        parse_target(text)


def test_facts_are_complete_and_plausible():
    for target in TARGETS.values():
        assert 10e9 < target.memory < 200e9
        assert 0.2e12 < target.memory_bandwidth < 10e12
        assert (target.gpu is None) == (target.platform == "tpu")
        assert target.memory_bandwidth > target.link_bandwidth > target.network_bandwidth
        if target.gpu:
            assert target.device_kind in gpu_target_config(target)
        else:
            assert target.tpu_topology
