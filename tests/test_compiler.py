"""Compiler options: the installed jaxlib knows each, the user's take precedence; and the cache of programs."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

from flacuna_jax.compiler import ALWAYS, MEMORY_FRACTION, SPLIT_WEIGHTS, compiler_options, prepare_process
from flacuna_jax.config.model import LoraConfig
from flacuna_jax.config.run import MeshConfig
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.model.sharding import make_mesh
from flacuna_jax.training.network import NetworkConfig
from flacuna_jax.training.state import StateLayout
from flacuna_jax.training.step import StepConfig, make_step
from tests.tiny import SMALL

GPU = ALWAYS["cuda"] | SPLIT_WEIGHTS["cuda"]


@pytest.mark.parametrize(("name", "value"), GPU.items())
def test_this_jaxlib_knows_each_gpu_option(name, value):
    """Every jaxlib knows the options of GPUs, even without a GPU; an unknown name is an error."""
    lowered = jax.jit(lambda x: x + 1).lower(jnp.ones(2))
    lowered.compile({name: value})
    with pytest.raises(jax.errors.JaxRuntimeError):
        lowered.compile({f"{name}_of_no_version": value})


def test_options_of_the_user_are_not_overridden():
    assert compiler_options("gpu", True, {}) == GPU == compiler_options("cuda", True, {})
    assert compiler_options("gpu", False, {}) == ALWAYS["cuda"]
    assert compiler_options("cpu", True, {}) == {}
    name = next(iter(GPU))
    left = compiler_options("gpu", True, {"XLA_FLAGS": f"--xla_dump_to=/nowhere --{name}=false"})
    assert left == {other: value for other, value in GPU.items() if other != name}


def test_the_step_is_compiled_with_them(monkeypatch, tmp_path):
    """Tested with an option that has a visible effect; an option that no compiler knows is omitted."""
    options = {"xla_dump_to": str(tmp_path), "xla_dump_hlo_as_text": True, "xla_an_option_of_no_version": True}
    monkeypatch.setitem(SPLIT_WEIGHTS, "cpu", options)
    spec = ModelSpec(SMALL, LoraConfig(), "float32", "float32")
    mesh = make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    layout = StateLayout(spec, optax.sgd(1.0), mesh)
    step = make_step(StepConfig(NetworkConfig(spec)), layout.optimizer, mesh, layout.shardings)
    base = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in spec.base_shapes.items()}
    shape = jax.ShapeDtypeStruct((1, 2, 16), "int32")
    batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), shape)
    batch["loss_mask"] = jax.ShapeDtypeStruct((1, 2, 16), "bool")
    with jax.set_mesh(mesh):
        lowered = step.jitted.lower(layout.trainable, layout.opt_state, base, batch, jax.ShapeDtypeStruct((), "int32"))
    lowered.compile()
    assert list(tmp_path.glob("*jit_step*"))


def test_prepare_process_sets_only_unset_variables(tmp_path):
    environment = {"FLACUNA_CACHE": str(tmp_path)}
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        prepare_process(environment)
        assert {name: str(getattr(jax.config, name)) for name in names} == {
            name: environment[name.upper()] for name in names
        }
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    assert environment["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "compiled")
    assert environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == str(MEMORY_FRACTION)

    said = {
        "JAX_COMPILATION_CACHE_DIR": "elsewhere",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "7",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5",
    }
    prepare_process(after := dict(said))
    assert after == said


PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from flacuna_jax.cli import run_verb

def verb(argv):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    print(float(jax.jit(lambda x: jnp.sum(jnp.sin(x) @ x.T))(np.ones((8, 8)))))

raise SystemExit(run_verb(verb, []))
"""


def test_programs_of_a_verb_are_reused(tmp_path):
    environment = {**os.environ, "FLACUNA_CACHE": str(tmp_path), "JAX_LOG_COMPILES": "0"}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    said = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said.append((done.stdout, sorted(path.name for path in (tmp_path / "compiled").glob("*-cache"))))
    assert said[0][1], "a program was cached"
    assert said[0] == said[1]
