"""The trajectory does not depend on the micro-batches or on the layout of arrays over devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.config.run import MeshConfig
from flacuna_jax.model.parameters import ModelSpec, init_params
from flacuna_jax.model.sharding import batch_sharding, make_mesh, parameter_shardings
from flacuna_jax.training.network import NetworkConfig
from flacuna_jax.training.step import StepConfig, make_step, partition
from tests.tiny import SMALL, in_steps, packed_batch

LENGTH, STEPS = 32, 4
RNG = np.random.default_rng(0)
DOCUMENTS = [RNG.integers(1, SMALL.vocab_size, size).tolist() for size in RNG.integers(4, 15, 24)]
# Seven full rows and an empty one, so that the count of supervised tokens differs from device to device.
ROWS = [[0, 1], [2, 3], [4], [5, 6], [7, 8], [9], [10, 11], []]
LAYOUTS = {
    "1 device, one batch of 8": (MeshConfig(), 8),
    "1 device, micro-batch 2": (MeshConfig(), 2),
    "data 4": (MeshConfig(data=4), 1),
    "fsdp 4": (MeshConfig(fsdp=4), 2),
    "fsdp 2 × tensor 2": (MeshConfig(fsdp=2, tensor=2), 2),
    "data 2 × tensor 2": (MeshConfig(data=2, tensor=2), 1),
    "replica 2 × fsdp 2": (MeshConfig(replica=2, fsdp=2), 1),
}


def specs(dropout: float) -> dict[str, ModelSpec]:
    targets = ("q_proj", "v_proj", "o_proj", "down_proj")
    return {
        "lora": ModelSpec(SMALL, LoraConfig(rank=4, dropout=dropout, targets=targets), "float32", "float32"),
        "full": ModelSpec(SMALL, None, "float32", "float32"),
    }


def run(spec: ModelSpec, layout: tuple[MeshConfig, int], remat: str = "none"):
    mesh_config, micro_batch = layout
    mesh = make_mesh(mesh_config)
    base = init_params(spec, spec.base, 1, mesh)
    before = {name: np.asarray(value) for name, value in base.items()}
    trainable, frozen = partition(spec, base, init_params(spec, spec.adapters, 2, mesh))
    optimizer = optax.adam(3e-3)
    shardings = parameter_shardings(spec.trainable, mesh)
    opt_state = optimizer.init(trainable)
    opt_shardings = optax.tree_map_params(
        optimizer,
        lambda _, s: s,
        opt_state,
        shardings,
        transform_non_params=lambda _: NamedSharding(mesh, PartitionSpec()),
    )
    opt_state = jax.device_put(opt_state, opt_shardings)
    step = make_step(StepConfig(NetworkConfig(spec, remat=remat)), optimizer, mesh, (shardings, opt_shardings))

    batch = in_steps(packed_batch(DOCUMENTS, ROWS, LENGTH), micro_batch * mesh_config.row_shards)
    batch = {name: jax.device_put(leaf, batch_sharding(mesh)) for name, leaf in batch.items()}
    losses = []
    for index in range(STEPS):
        trainable, opt_state, metrics = step(trainable, opt_state, frozen, batch, np.int32(index))
        losses.append((float(metrics.loss), float(metrics.grad_norm)))
    for name, value in frozen.items():
        np.testing.assert_array_equal(np.asarray(value), before[name], err_msg=name)
    assert step.jitted._cache_size() == 1, "the step compiled more than once"
    return np.array(losses), {name: np.asarray(value) for name, value in trainable.items()}


@pytest.fixture(scope="module")
def expected():
    return {
        (kind, dropout): run(spec, LAYOUTS["1 device, one batch of 8"])
        for kind, dropout in [("lora", 0.0), ("lora", 0.05), ("full", 0.0)]
        for spec in [specs(dropout)[kind]]
    }


@pytest.mark.parametrize("layout", list(LAYOUTS.values())[1:], ids=list(LAYOUTS)[1:])
@pytest.mark.parametrize(("kind", "dropout"), [("lora", 0.0), ("lora", 0.05), ("full", 0.0)])
def test_layouts_agree(expected, layout, kind, dropout):
    losses, trainable = run(specs(dropout)[kind], layout)
    expected_losses, expected_trainable = expected[kind, dropout]
    # Other layouts sum in another order; float32 rounding over a few steps stays well below 1e-5.
    np.testing.assert_allclose(losses[:, 0], expected_losses[:, 0], atol=1e-5)
    np.testing.assert_allclose(losses[:, 1], expected_losses[:, 1], rtol=1e-4)
    for name, value in trainable.items():
        difference = np.linalg.norm(value - expected_trainable[name]) / np.linalg.norm(expected_trainable[name])
        assert difference < 1e-3, name  # Adam turns rounding of near-zero gradients into whole steps of single elements


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_does_not_change_the_trajectory(expected, remat):
    losses, _ = run(specs(0.05)["lora"], LAYOUTS["fsdp 4"], remat)
    np.testing.assert_allclose(losses[:, 0], expected["lora", 0.05][0][:, 0], atol=1e-5)


def test_dropout_has_an_effect_and_differs_by_step(expected):
    assert np.abs(expected["lora", 0.05][0] - expected["lora", 0.0][0]).max() > 1e-5
    spec = specs(0.5)["lora"]
    mesh = make_mesh(MeshConfig())
    base = init_params(spec, spec.base, 1, mesh)
    adapters = {name: value + 0.1 for name, value in init_params(spec, spec.adapters, 2, mesh).items()}
    batch = {n: jnp.asarray(v) for n, v in in_steps(packed_batch(DOCUMENTS, ROWS, LENGTH), 8).items()}
    from flacuna_jax.training.step import loss_and_gradients

    run_loss = jax.jit(
        lambda index: loss_and_gradients(StepConfig(NetworkConfig(spec)), adapters, base, batch, index)[0]
    )
    first, again, second = float(run_loss(0)), float(run_loss(0)), float(run_loss(1))
    assert first == again
    assert first != second


def test_an_all_empty_step_gives_zero_and_no_nan():
    spec = specs(0.05)["lora"]
    mesh = make_mesh(MeshConfig())
    base = init_params(spec, spec.base, 1, mesh)
    adapters = init_params(spec, spec.adapters, 2, mesh)
    empty = {name: jnp.asarray(leaf) for name, leaf in in_steps(packed_batch([], [[], []], LENGTH), 2).items()}
    from flacuna_jax.training.step import loss_and_gradients

    loss, _, gradients = loss_and_gradients(StepConfig(NetworkConfig(spec)), adapters, base, empty, jnp.int32(0))
    assert float(loss) == 0
    assert all(not np.asarray(g).any() for g in gradients.values())
