"""The FLOP count against XLA's count, and against a count by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.training.flops import StepFlops

SIZES = LlamaConfig(
    vocab_size=64, hidden_size=128, intermediate_size=256, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32
)
MATRICES = 2 * (128 * 128 * 2 + 2 * 128 * 64 + 3 * 128 * 256)


def test_flops_equal_a_count_by_hand():
    full = StepFlops.of(ModelSpec(SIZES, None, "float32", "float32"))
    assert full.per_token == 6 * MATRICES
    assert full.per_supervised == 6 * 64 * 128
    assert full.per_pair == 12 * 2 * 4 * 32
    lora = StepFlops.of(ModelSpec(SIZES, LoraConfig(rank=4, targets=("q_proj",)), "float32", "float32"))
    assert lora.per_token == 4 * MATRICES + 6 * 2 * 4 * (128 + 128)
    assert lora.per_supervised == 4 * 64 * 128
    assert lora.count(np.array([3, 5]), 2) == 8 * lora.per_token + 2 * lora.per_supervised + 21 * lora.per_pair


def test_pairs_further_apart_than_a_window_do_not_count():
    sizes = dataclasses.replace(SIZES, sliding_window=3, windowed_layers=(1,))
    flops = StepFlops.of(ModelSpec(sizes, None, "float32", "float32"))
    per_layer = 12 * 4 * 32
    lengths = [2, 3, 7]
    whole = sum(query + 1 for length in lengths for query in range(length))
    windowed = sum(min(query + 1, 3) for length in lengths for query in range(length))
    expected = flops.per_token * sum(lengths) + per_layer * (whole + windowed)
    assert flops.count(np.array(lengths), 0) == expected


@pytest.mark.parametrize(("trains", "products"), [(True, 3), (False, 2)])
def test_flops_of_products_equal_xlas_count(trains, products):
    """One matrix product and its gradients, with and without the gradient of the weight."""
    x, w = jnp.ones((64, 128)), jnp.ones((256, 128))

    def loss(x, w):
        return jnp.sum(jnp.einsum("td,od->to", x, w) ** 2)

    gradient = jax.jit(jax.value_and_grad(loss, (0, 1) if trains else 0))
    counted = gradient.lower(x, w).compile().cost_analysis()["flops"]
    assert counted == pytest.approx(products * 2 * 64 * 128 * 256, rel=0.02)
