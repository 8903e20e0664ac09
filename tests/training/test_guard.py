"""A bad step changes nothing, and a good step has the same effect as without the guard."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flacuna_jax.config.training import TrainingConfig
from flacuna_jax.training.guard import SETTLING, GuardState
from flacuna_jax.training.optimizer import learning_rate_schedule, make_optimizer
from tests.tiny import described

PARAMS = {"layers/q_proj/lora_a": jnp.ones((2, 3, 4)), "norm/weight": jnp.ones(4)}


def optimizer(**settings):
    return make_optimizer(TrainingConfig(learning_rate=0.1, weight_decay=0.01, **settings), 100, described(PARAMS))


@functools.cache
def jitted(spike_factor):
    made = optimizer(spike_factor=spike_factor)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, gradients, loss):
        updates, state = made.update(gradients, state, params, loss=loss)
        return jax.tree.map(jnp.add, params, updates), state

    return made, step


def gradients(step, scale=1.0):
    keys = jax.random.split(jax.random.key(step), len(PARAMS))
    return {
        name: scale * jax.random.normal(key, leaf.shape) for key, (name, leaf) in zip(keys, PARAMS.items(), strict=True)
    }


def run(steps, spike_factor=None):
    """`steps`: (gradients, loss) each. Returns parameters and state."""
    made, step = jitted(spike_factor)
    params, state = jax.tree.map(jnp.copy, PARAMS), made.init(PARAMS)
    for gradient, loss in steps:
        params, state = step(params, state, gradient, jnp.float32(loss))
    return params, state


def as_bytes(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def poisoned(step, value):
    made = gradients(step)
    return {**made, "norm/weight": made["norm/weight"].at[1].set(value)}


BAD = {
    "gradient not a number": (poisoned(7, math.nan), 1.0),
    "gradient infinite": (poisoned(7, -math.inf), 1.0),
    "gradient overflows in its norm": (gradients(7, 3e38), 1.0),
    "loss not a number": (gradients(7), math.nan),
    "loss infinite": (gradients(7), math.inf),
}


@pytest.mark.parametrize(("gradient", "loss"), BAD.values(), ids=BAD.keys())
def test_a_run_with_a_bad_step_equals_the_run_without_that_step(gradient, loss):
    good = [(gradients(step), 1.0) for step in range(6)]
    params, state = run(good)
    with_bad, state_with_bad = run([*good[:3], (gradient, loss), *good[3:]])
    assert as_bytes(with_bad) == as_bytes(params)
    assert as_bytes(state_with_bad.inner) == as_bytes(state.inner), "moments and the schedule's count"
    assert (int(state_with_bad.skipped), int(state_with_bad.in_a_row)) == (1, 0)
    assert (int(state.skipped), int(state_with_bad.accepted)) == (0, 6)


def test_consecutive_bad_steps_are_counted_until_a_good_one():
    bad = (poisoned(1, math.nan), 1.0)
    _, state = run([(gradients(0), 1.0), bad, bad])
    assert (int(state.skipped), int(state.in_a_row)) == (2, 2)
    _, state = run([(gradients(0), 1.0), bad, bad, (gradients(2), 1.0), bad])
    assert (int(state.skipped), int(state.in_a_row)) == (3, 1)


@pytest.mark.parametrize(("scale", "loss"), [(50.0, 1.0), (1.0, 50.0)], ids=["norm", "loss"])
def test_a_spike_is_bad_only_after_enough_accepted_steps(scale, loss):
    early = [(gradients(step), 1.0) for step in range(SETTLING - 1)]
    _, state = run([*early, (gradients(99, scale), loss)], spike_factor=5.0)
    assert int(state.skipped) == 0
    settled = [(gradients(step), 1.0) for step in range(SETTLING)]
    _, state = run([*settled, (gradients(99, scale), loss)], spike_factor=5.0)
    assert int(state.skipped) == 1
    _, state = run([*settled, (gradients(99, scale), loss)])
    assert int(state.skipped) == 0, "without spike_factor, finite steps are good"


def test_the_guard_compares_with_a_running_mean_that_excludes_spikes():
    _, state = run([(gradients(step), 2.0) for step in range(7)])
    assert isinstance(state, GuardState)
    weight = 1 - 0.95**7
    np.testing.assert_allclose(state.loss_mean / weight, 2.0, rtol=1e-6)
    # A spike does not change the mean; otherwise a second consecutive spike would be accepted.
    settled = [(gradients(step), 1.0) for step in range(SETTLING)]
    _, state = run([*settled, (gradients(99), 50.0), (gradients(98), 50.0)], spike_factor=5.0)
    assert int(state.in_a_row) == 2


def test_the_schedule_counts_updates_and_not_batches():
    schedule = learning_rate_schedule(TrainingConfig(learning_rate=0.1), 100)
    bad = (poisoned(1, math.nan), 1.0)
    before, _ = run([bad, bad])
    after, _ = run([bad, bad, (gradients(0), 1.0)])
    # Adam's first update is the learning rate in every element, for any gradient; only matrices have weight decay.
    moved = np.abs(np.asarray(after["norm/weight"] - before["norm/weight"]))
    np.testing.assert_allclose(moved, float(schedule(0)), rtol=1e-4)
