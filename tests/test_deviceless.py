"""Compiling for absent devices with the installed JAX: stand-ins for GPUs, and known options."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh

from flacuna_jax import deviceless
from flacuna_jax.deviceless import StandIn, kind_compiled_for, known_options, lowering_for, quick_options
from flacuna_jax.kernels import attention as attention_module
from flacuna_jax.kernels.attention import attention
from flacuna_jax.kernels.packed_mask import PackedMask
from flacuna_jax.planning.targets import TARGETS

GPUS = {name: target for name, target in TARGETS.items() if target.gpu is not None}
A10 = StandIn(device_kind="NVIDIA A10", num_cores=84, platform="gpu", stands_for="NVIDIA RTX A6000")


def described(target):
    """The facts of a GPU that lowering reads: its name, capability and size."""
    major, minor = target.gpu.compute_capability
    return SimpleNamespace(
        platform="gpu",
        device_kind=target.device_kind,
        compute_capability=f"{major}.{minor}",
        core_count=target.gpu.cores,
    )


@pytest.mark.parametrize("name", GPUS)
def test_attention_is_lowered_for_every_gpu_of_the_table(name):
    """By its own name if this JAX accepts it, otherwise by that of a stand-in. The T4 has attention in plain XLA."""
    gpu = described(GPUS[name])
    stand_in = deviceless._stand_in(gpu)
    device = stand_in or AbstractDevice(device_kind=gpu.device_kind, num_cores=gpu.core_count, platform="gpu")
    assert kind_compiled_for(device) == gpu.device_kind
    mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=device)
    q = jax.ShapeDtypeStruct((2, 128, 4, 64), jnp.bfloat16)
    interval = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(attention).trace(q, q, q, PackedMask(interval, interval)).lower(lowering_platforms=("cuda",))
    assert ("__gpu$xla.gpu.triton" in lowered.as_text()) == (name != "t4")


def test_programs_for_absent_devices_are_not_cached():
    """JAX would read them back at the next plan, fail, and warn."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    with deviceless.not_cached(described(GPUS["a6000"])):
        assert getattr(jax.config, name) == float("inf")
    with deviceless.not_cached(jax.devices()[0]):
        assert getattr(jax.config, name) == before
    assert getattr(jax.config, name) == before


def test_an_unlisted_gpu_has_a_stand_in_only_if_jax_needs_one():
    stand_in = deviceless._stand_in(described(GPUS["a6000"]))
    assert stand_in in (None, A10)
    own_name = AbstractDevice(device_kind="NVIDIA RTX A6000", num_cores=84, platform="gpu")
    assert (stand_in is None) == deviceless._lowers_kernels(own_name)
    assert deviceless._stand_in(described(GPUS["h100"])) is None
    assert deviceless._stand_in(SimpleNamespace(platform="tpu", device_kind="TPU v4")) is None
    unknown = dataclasses.replace(GPUS["a6000"].gpu, compute_capability=(99, 0))
    assert deviceless._stand_in(described(dataclasses.replace(GPUS["a6000"], gpu=unknown))) is None


def test_tiles_are_chosen_for_the_gpu_behind_a_stand_in():
    mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=A10)
    with jax.sharding.use_abstract_mesh(mesh):
        assert attention_module.ambient_device() == ("NVIDIA RTX A6000", "gpu")


def test_the_mesh_is_ambient_as_with_set_mesh(monkeypatch):
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",), axis_types=(AxisType.Auto,))
    for stand_in in (None, A10):
        monkeypatch.setattr(deviceless, "_stand_in", lambda device, found=stand_in: found)
        with lowering_for(mesh):
            ambient = jax.sharding.get_abstract_mesh()
            assert (ambient.axis_names, ambient.axis_sizes) == (("data",), (2,))
            assert ambient.abstract_device == (stand_in or mesh.abstract_mesh.abstract_device)
        assert jax.sharding.get_abstract_mesh().empty


def test_unknown_options_are_omitted_with_a_warning(caplog):
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    assert known_options(mesh, {"xla_cpu_enable_fast_math": True}) == {"xla_cpu_enable_fast_math": True}
    assert not caplog.text
    options = {"xla_cpu_enable_fast_math": True, "xla_of_yesterday": 3}
    assert known_options(mesh, options) == {"xla_cpu_enable_fast_math": True}
    assert "does not know xla_of_yesterday=3" in caplog.text
    assert known_options(mesh, {}) == {}


def test_the_first_known_options_for_quick_compiling_are_used(monkeypatch, caplog):
    device = jax.devices()[0]
    assert quick_options(device) == {}
    assert not caplog.text
    known = {"xla_backend_optimization_level": 0}
    monkeypatch.setattr(deviceless, "QUICK", {"cpu": ({"effort_of_yesterday": -1.0}, known)})
    assert quick_options(device) == known
    monkeypatch.setattr(deviceless, "QUICK", {"cpu": ({"effort_of_yesterday": -1.0},)})
    assert quick_options(device) == {}
    assert "effort_of_yesterday" in caplog.text
