"""Meshes of one host, many hosts and several TPU slices, simulated."""

from dataclasses import dataclass

import jax
import numpy as np
import pytest

from flacuna_jax.config.run import MeshConfig
from flacuna_jax.errors import UserError
from flacuna_jax.model import sharding
from flacuna_jax.model.sharding import MESH_AXES, make_mesh, split_everywhere


@dataclass(frozen=True)
class Chip:
    """The attributes of a device that a mesh reads."""

    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    core_on_chip: int = 0

    @property
    def coords(self) -> tuple[int, int, int]:
        return self.id % 2, self.id % 100 // 2, 0


def two_slices_of_four() -> list[Chip]:
    """Ids like those of libtpu, which are not ordered by the hosts of a slice."""
    return [Chip(100 * s + i, process_index=2 * s + i // 2, slice_index=s) for i in (2, 3, 0, 1) for s in (1, 0)]


def grid(config: MeshConfig, devices) -> np.ndarray:
    return sharding._device_grid(config, devices)


def test_auto_splits_weights_only_within_a_slice():
    assert split_everywhere(two_slices_of_four()) == MeshConfig(replica=2, fsdp=4)
    assert split_everywhere(jax.devices()[:4]) == MeshConfig(fsdp=4)


@pytest.mark.parametrize(
    "config",
    [MeshConfig(replica=2, fsdp=4), MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(replica=2, data=2, fsdp=2)],
)
def test_only_the_slow_axes_cross_slices(config):
    laid = grid(config, two_slices_of_four())
    assert laid.shape == (config.replica, config.data, config.fsdp, config.tensor)
    assert {chip.id for chip in laid.ravel()} == {0, 1, 2, 3, 100, 101, 102, 103}
    copies = laid.reshape(config.replica * config.data, -1)
    assert all(len({chip.slice_index for chip in copy}) == 1 for copy in copies)


@pytest.mark.parametrize("config", [MeshConfig(fsdp=8), MeshConfig(replica=1, fsdp=4, tensor=2)])
def test_weights_split_across_slices_are_an_error(config):
    with pytest.raises(UserError, match=r"replica 1 × data 1 is not a multiple of the 2 TPU slices; set replica: 2"):
        grid(config, two_slices_of_four())


def test_replicas_are_whole_hosts():
    hosts = [Chip(i, process_index=i // 4, platform="cuda", device_kind="NVIDIA H100") for i in range(8)]
    laid = grid(MeshConfig(replica=2, fsdp=4), hosts)
    assert [[chip.process_index for chip in replica.ravel()] for replica in laid] == [[0] * 4, [1] * 4]
    # GPUs have no slices: fsdp may cross hosts if a model needs it.
    assert grid(MeshConfig(fsdp=8), hosts).shape == (1, 1, 8, 1)


def test_the_mesh_of_this_host():
    mesh = make_mesh(MeshConfig(replica=2, data=1, fsdp=2))
    assert dict(mesh.shape) == {"replica": 2, "data": 1, "fsdp": 2, "tensor": 1}
    assert tuple(mesh.shape) == MESH_AXES
    with pytest.raises(UserError, match="replica 2 × data 2 × fsdp 2 × tensor 1 needs 8 devices, but there are 4"):
        make_mesh(MeshConfig(replica=2, data=2, fsdp=2))
