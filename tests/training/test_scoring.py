"""Sums by label equal sums over the tokens of a plain forward pass, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.config.run import MeshConfig
from flacuna_jax.kernels.packed_mask import make_packed_mask
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.model.sharding import batch_sharding, make_mesh, parameter_shardings
from flacuna_jax.training.loop import to_devices
from flacuna_jax.training.network import NetworkConfig
from flacuna_jax.training.scoring import make_scorer
from flacuna_jax.training.step import StepConfig, partition
from tests.tiny import SMALL, in_steps, packed_batch, random_params

SPEC = ModelSpec(SMALL, LoraConfig(rank=2, dropout=0.5), "float32", "float32")
LABELS = 5


def inputs():
    """Eight rows of two documents; the label of a document is its number modulo 6, and label 5 is not counted."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(3, SMALL.vocab_size, size).tolist() for size in rng.integers(4, 12, 16)]
    batch = packed_batch(documents, [[2 * row, 2 * row + 1] for row in range(8)], 24, loss_from=3)
    number = 2 * np.arange(8)[:, None] + batch["segment_ids"] - 1
    label = np.where(number % 6 == 5, -1, number % 6)
    return {**batch, "labels": np.where(batch["segment_ids"] > 0, label, -1).astype(np.int32)}


def plain(params, batch):
    model = SPEC.merge(params)
    mask = make_packed_mask(jnp.asarray(batch["segment_ids"]))
    logits = model.logits(model(jnp.asarray(batch["tokens"]), jnp.asarray(batch["positions"]), mask))
    log_probabilities = jax.nn.log_softmax(logits)
    losses = -np.asarray(jnp.take_along_axis(log_probabilities, jnp.asarray(batch["targets"])[..., None], -1)[..., 0])
    hits = np.asarray(jnp.argmax(logits, -1)) == batch["targets"]
    chosen = [batch["loss_mask"] & (batch["labels"] == label) for label in range(LABELS)]
    return tuple(np.array([x[c].sum() for c in chosen]) for x in (losses, hits, np.ones_like(losses)))


@pytest.mark.parametrize("mesh_config", [MeshConfig(), MeshConfig(fsdp=2, tensor=2)])
def test_sums_by_label_equal_the_plain_forward_pass(mesh_config):
    batch, mesh = inputs(), make_mesh(mesh_config)
    base = random_params(SPEC.base_shapes, 0.3)
    adapters = random_params(SPEC.lora_shapes, 0.3, seed=1)
    expected = plain({**base, **adapters}, batch)
    adapters, base = (
        jax.device_put(params, parameter_shardings(parameters, mesh))
        for params, parameters in ((adapters, SPEC.adapters), (base, SPEC.base))
    )
    trainable, frozen = partition(SPEC, base, adapters)
    score = make_scorer(StepConfig(NetworkConfig(SPEC)), LABELS, mesh)
    sums = jax.device_get(score(trainable, frozen, to_devices(in_steps(batch, 2), batch_sharding(mesh))))
    # float32 over two layers; sums of a few dozen losses of about 5.
    np.testing.assert_allclose(sums.values["loss"], expected[0], rtol=1e-5)
    np.testing.assert_array_equal(sums.values["token_accuracy"], expected[1])
    np.testing.assert_array_equal(sums.tokens, expected[2])
    assert sums.tokens.sum() < batch["loss_mask"].sum(), "label -1 counts nowhere"
