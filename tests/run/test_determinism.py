"""The check passes if steps are deterministic, and fails otherwise."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flacuna_jax.config.run import MeshConfig
from flacuna_jax.model.sharding import make_mesh
from flacuna_jax.run.determinism import Beginning, NotDeterministic, check_determinism
from flacuna_jax.training.state import TrainState
from tests.small_run import write_run
from tests.test_end_to_end import run

SHARDING = NamedSharding(make_mesh(MeshConfig()), PartitionSpec())


def beginnings(noise):
    """`noise(start, step)` is added to the weights; 0 for a deterministic step."""
    starts = itertools.count()

    def begin():
        start = next(starts)

        def step(trainable, opt_state, frozen, batch, index):
            after = {"w": trainable["w"] + batch["tokens"].sum() + noise(start, int(index))}
            return after, opt_state, (jnp.float32(1),)

        batches = iter([{"tokens": np.ones(2, np.float32)}] * 5)
        return Beginning(TrainState(0, {"w": jnp.zeros(3)}, {"m": jnp.zeros(2)}), {}, step, batches)

    return begin


def test_equal_bytes_are_reported_with_their_digests():
    said = []
    check_determinism(beginnings(lambda start, step: 0.0), SHARDING, 100, said.append)
    assert [line[:7] for line in said] == ["step 1:", "step 2:", "step 3:", "determi"]
    check_determinism(beginnings(lambda start, step: 0.0), SHARDING, 2, said.append)
    assert said[4] == said[0], "digests may be compared between processes"


def test_a_small_difference_is_an_error_that_names_the_step():
    with pytest.raises(NotDeterministic, match="after step 2 the same seed gave different bytes"):
        check_determinism(beginnings(lambda start, step: 1e-6 * (start == 1 and step == 1)), SHARDING, 3, print)


def test_the_command_checks_determinism_and_writes_nothing(tmp_path, capsys):
    assert run(write_run(tmp_path), "--check_determinism") == 0
    assert "deterministic: 3 steps gave the same bytes twice" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
