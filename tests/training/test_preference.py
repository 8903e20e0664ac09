"""Preference objectives on packed pairs: the same values packed, padded and alone; one trajectory on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.config.objectives import DpoConfig, KtoConfig, OrpoConfig, PreferenceConfig, SimpoConfig
from flacuna_jax.config.run import MeshConfig
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.model.sharding import batch_sharding, make_mesh
from flacuna_jax.training.network import NetworkConfig
from flacuna_jax.training.preference import by_document, preference_objective
from flacuna_jax.training.scoring import make_scorer, make_statistics
from flacuna_jax.training.state import StateLayout
from flacuna_jax.training.step import StepConfig, loss_and_gradients, make_step
from tests.tiny import SMALL, in_steps, packed_batch, random_params, to_device

LENGTH = 48
RNG = np.random.default_rng(4)
DOCUMENTS = [RNG.integers(1, SMALL.vocab_size, size).tolist() for size in (9, 6, 12, 5, 7, 8, 10, 4)]
GOOD = [True, False, False, True]
"""Labels of the four examples, for KTO."""
SPEC = ModelSpec(SMALL, LoraConfig(rank=3, dropout=0.0), "float32", "float32")
SETTINGS = {
    "dpo": DpoConfig(name="dpo", sft_weight=0.2),
    "simpo": SimpoConfig(name="simpo"),
    "orpo": OrpoConfig(name="orpo", sft_on="all"),
    "kto": KtoConfig(name="kto", undesirable_weight=2.0),
}
PACKED, PADDED = [[0, 1], [2], [3]], [[0], [1], [2], [3]]


def batch_of(rows: list[list[int]], settings: PreferenceConfig, length: int = LENGTH) -> dict[str, np.ndarray]:
    """Rows of examples by index; example i has the documents 2 i and 2 i + 1."""
    batch = packed_batch(DOCUMENTS, [[2 * i + part for i in row for part in (0, 1)] for row in rows], length, 3)
    if isinstance(settings, KtoConfig):
        batch["good"] = np.zeros(batch["tokens"].shape, bool)
        for number, row in enumerate(rows):
            for place, example in enumerate(row):
                batch["good"][number] |= (batch["segment_ids"][number] > 2 * place) & GOOD[example]
                batch["good"][number] &= (batch["segment_ids"][number] <= 2 * place) | GOOD[example]
    return batch


def config_of(settings: PreferenceConfig) -> StepConfig:
    return StepConfig(NetworkConfig(SPEC), objective=preference_objective(settings))


@pytest.fixture(scope="module")
def params():
    return random_params(SPEC.base_shapes, 0.2), random_params(SPEC.lora_shapes, 0.1)


def values(settings, params, batch, micro_batch: int):
    base, adapters = params
    run = jax.jit(loss_and_gradients, static_argnums=0)
    return run(config_of(settings), adapters, base, to_device(in_steps(batch, micro_batch)), jnp.int32(0))


def some_slow(*names: str) -> list:
    """Names of objectives; those in `names` are in the slow set, because each compiles its own step."""
    return [pytest.param(one, marks=pytest.mark.slow) if one in names else one for one in SETTINGS]


@pytest.mark.parametrize("name", some_slow("simpo", "orpo"))
def test_packed_pairs_have_the_values_of_padded_ones_for_any_micro_batch(name, params):
    settings = SETTINGS[name]
    loss, scalars, gradients = values(settings, params, batch_of([*PACKED, []], settings), 1)
    other, other_scalars, other_gradients = values(settings, params, batch_of(PADDED, settings), 4)
    # Sums in another order: float32 rounding.
    assert float(loss) == pytest.approx(float(other), rel=1e-5)
    assert scalars.keys() == other_scalars.keys()
    for key, value in scalars.items():
        assert float(value) == pytest.approx(float(other_scalars[key]), rel=1e-4, abs=1e-5), key
    for key, value in gradients.items():
        np.testing.assert_allclose(value, other_gradients[key], rtol=1e-3, atol=1e-5, err_msg=key)


def test_a_pair_has_no_influence_on_another_in_its_row(params):
    """Log-probabilities of the first pair are the same bytes, whatever the second one contains."""
    base, adapters = params
    network = NetworkConfig(SPEC).with_params({**base, **adapters})
    run = jax.jit(lambda batch: by_document(network.token_losses(batch), batch["segment_ids"]))
    batch = batch_of([[0, 1]], SETTINGS["dpo"])
    other = {**batch, "tokens": np.where(batch["segment_ids"] > 2, 7, batch["tokens"])}
    first, second = (np.asarray(run(to_device(one)))[0] for one in (batch, other))
    np.testing.assert_array_equal(first[0], second[0])
    assert (first[1] != second[1]).all()
    assert (first[2:] == 0).all()


@pytest.mark.parametrize("name", some_slow("dpo", "simpo", "orpo"))
def test_an_evaluation_has_the_figures_of_the_step(name, params):
    settings, mesh = SETTINGS[name], make_mesh(MeshConfig())
    base, adapters = params
    config, batch = config_of(settings), batch_of(PADDED, settings)
    loss, scalars, _ = values(settings, params, batch, 2)
    stacked = to_device(in_steps({**batch, "labels": np.where(batch["segment_ids"] > 0, 0, -1)}, 2))
    statistics = {name: found.mean() for name, found in make_statistics(config, mesh)(adapters, base, stacked).items()}
    sums = make_scorer(config, 1, mesh)(adapters, base, stacked, statistics)
    assert int(sums.tokens[0]) == 4
    figures = config.objective.derived({name: float(value[0]) / 4 for name, value in sums.values.items()})
    assert figures.keys() == {"loss", *scalars}
    for key, value in {"loss": loss, **scalars}.items():
        assert figures[key] == pytest.approx(float(value), rel=1e-4, abs=1e-6), key


MESHES = {"data 4": MeshConfig(data=4), "fsdp 2 × tensor 2": MeshConfig(fsdp=2, tensor=2), "fsdp 4": MeshConfig(fsdp=4)}


def trajectory(settings: PreferenceConfig, mesh_config: MeshConfig, params, steps: int = 3):
    mesh = make_mesh(mesh_config)
    layout = StateLayout(SPEC, optax.adam(3e-3), mesh)
    base, adapters = params
    shardings = layout.shardings[0]
    # Copied, because the step donates its arguments.
    placed = {path: jax.device_put(np.array(value), shardings[path]) for path, value in adapters.items()}
    state = layout.begin(placed)
    step = make_step(config_of(settings), layout.optimizer, mesh, layout.shardings)
    shards = mesh_config.row_shards
    batch = in_steps(batch_of([*PACKED, []], settings), shards)
    batch = {name: jax.device_put(leaf, batch_sharding(mesh)) for name, leaf in batch.items()}
    trainable, opt_state, losses = state.trainable, state.opt_state, []
    for index in range(steps):
        trainable, opt_state, metrics = step(trainable, opt_state, base, batch, np.int32(index))
        losses.append([float(metrics.loss), float(metrics.grad_norm)])
    return np.array(losses)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_four_devices_in_any_mesh_give_one_trajectory(name, mesh, params):
    expected = trajectory(SETTINGS[name], MeshConfig(), params)
    np.testing.assert_allclose(trajectory(SETTINGS[name], mesh, params), expected, rtol=1e-4)
