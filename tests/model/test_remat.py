"""The results that a layer saves for its backward pass: exactly those that its policy and its adapters need."""

import contextlib
import io
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.model.remat import REMAT_POLICIES
from flacuna_jax.training.network import NetworkConfig
from flacuna_jax.training.step import StepConfig, loss_and_gradients
from tests.tiny import in_steps, packed_batch, random_params, to_device

# All widths differ, so that the shape identifies an array.
NETWORK = LlamaConfig(
    vocab_size=101, hidden_size=24, intermediate_size=56, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=10
)
ROWS, LENGTH, RANK = 2, 32, 5
MODEL, QUERIES, KEYS, FEED_FORWARD = 24, 40, 20, 56
RNG = np.random.default_rng(0)
BATCH = packed_batch([RNG.integers(1, 101, size).tolist() for size in (20, 9, 28)], [[0, 1], [2]], LENGTH)


def spec_for(*targets):
    return ModelSpec(
        NETWORK, LoraConfig(rank=RANK, dropout=0.0, targets=targets or ("q_proj", "v_proj")), *["float32"] * 2
    )


def kept_by_layers(spec, remat):
    """{width: how many arrays [layers, rows, length, width] wait for the backward pass}, per layer."""
    config = NetworkConfig(spec, remat=remat, attention="xla")
    base, adapters = random_params(spec.base_shapes, 0.1), random_params(spec.lora_shapes, 0.1)
    batch = to_device(BATCH)

    def loss(adapters):
        return jnp.sum(config.with_params({**base, **adapters}).token_losses(batch))

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        print_saved_residuals(loss, adapters)
    found = Counter()
    for line in printed.getvalue().splitlines():
        shape = [int(size) for size in re.match(r"\w+\[([\d,]*)\]", line)[1].split(",") if size]
        if shape[:3] == [NETWORK.num_layers, ROWS, LENGTH]:
            found[int(np.prod(shape[3:]))] += 1
    return found


def test_full_saves_only_the_input_of_a_layer():
    assert kept_by_layers(spec_for(), "full") == {MODEL: 1}


def test_attention_also_saves_its_output():
    assert kept_by_layers(spec_for(), "attention") == {MODEL: 1, QUERIES: 1}


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("q_proj", "down_proj")])
def test_dots_saves_the_sum_of_each_projection_and_attention(targets):
    """Nothing of rank 5, for any targets: the products of adapters are small and recomputed."""
    # Model: the layer's input and o_proj's sum; down_proj's is the next layer's input. Then q and attention's output, k
    # and v, gate and up.
    assert kept_by_layers(spec_for(*targets), "dots") == {MODEL: 2, QUERIES: 2, KEYS: 2, FEED_FORWARD: 2}


@pytest.mark.parametrize(
    ("module", "width"),
    [("o_proj", QUERIES), ("gate_proj", MODEL), ("up_proj", MODEL), ("down_proj", FEED_FORWARD)],
)
def test_a_frozen_product_saves_its_input_only_for_an_adapter(module, width):
    """Even if everything is saved, the input of a projection without an adapter is not."""
    without, beside = kept_by_layers(spec_for("k_proj"), "none"), kept_by_layers(spec_for("k_proj", module), "none")
    more = Counter(beside)
    more.subtract(without)
    more.pop(RANK)
    assert {w: n for w, n in more.items() if n} == {width: 1}


@pytest.mark.parametrize("remat", [name for name in REMAT_POLICIES if name != "none"])
def test_policies_do_not_change_gradients(remat):
    """At most the order of rounding differs: 1e-5 of a gradient's norm in float32."""
    spec = spec_for("q_proj", "down_proj")
    base, adapters = random_params(spec.base_shapes, 0.1), random_params(spec.lora_shapes, 0.1)
    batch = to_device(in_steps(BATCH, ROWS))

    def gradients(remat):
        config = StepConfig(NetworkConfig(spec, remat=remat))
        return jax.jit(loss_and_gradients, static_argnums=0)(config, adapters, base, batch, jnp.int32(0))

    (loss, _, kept), (other_loss, _, again) = gradients("none"), gradients(remat)
    assert float(other_loss) == pytest.approx(float(loss), rel=1e-6)
    for name, value in kept.items():
        assert jnp.linalg.norm(again[name] - value) <= 1e-5 * jnp.linalg.norm(value), name
