"""The network against transformers' LlamaForCausalLM, float32, on small random configurations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.kernels.packed_mask import make_packed_mask
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import ModelSpec, count
from tests.tiny import SMALL
from tests.torch_models import config_of, from_torch, torch, torch_llama, transformers

# Both sides compute in float32 with different summation orders; logits are O(1).
TOLERANCE = 1e-4

VARIANTS = {
    "plain": SMALL,
    "grouped queries": dataclasses.replace(SMALL, num_kv_heads=2),
    "tied": dataclasses.replace(SMALL, tie_word_embeddings=True, num_kv_heads=1),
    "odd sizes": dataclasses.replace(SMALL, vocab_size=61, hidden_size=30, num_heads=3, num_kv_heads=3, head_dim=14),
    "other theta": dataclasses.replace(SMALL, rope_theta=5e5),
    "other eps": dataclasses.replace(SMALL, rms_norm_eps=1e-2),
}


def our_logits(config: LlamaConfig, params: dict[str, jax.Array], tokens_bt: np.ndarray, **model_kwargs) -> np.ndarray:
    spec = ModelSpec(config, None, "float32", "float32")
    batch, length = tokens_bt.shape
    mask = make_packed_mask(jnp.ones((batch, length), jnp.int32))
    positions_bt = jnp.broadcast_to(jnp.arange(length), (batch, length))
    model = spec.merge(params)
    return np.asarray(model.logits(model(jnp.asarray(tokens_bt), positions_bt, mask, **model_kwargs)))


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_equal_transformers(config):
    reference = torch_llama(config)
    tokens_bt = np.random.default_rng(1).integers(0, config.vocab_size, (2, 19))
    with torch.no_grad():
        expected = reference(torch.as_tensor(tokens_bt)).logits.numpy()
    actual = our_logits(config, from_torch(reference, config), tokens_bt)
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_rope_theta_changes_logits():
    params = from_torch(torch_llama(SMALL), SMALL)
    tokens_bt = np.arange(12)[None]
    other = dataclasses.replace(SMALL, rope_theta=2e4)
    assert np.abs(our_logits(SMALL, params, tokens_bt) - our_logits(other, params, tokens_bt)).max() > 1e-3


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_nothing(remat):
    params = from_torch(torch_llama(SMALL), SMALL)
    tokens_bt = np.arange(12)[None]
    np.testing.assert_array_equal(
        our_logits(SMALL, params, tokens_bt), our_logits(SMALL, params, tokens_bt, remat=remat)
    )


def test_trained_story_model_continues_as_documented(story_llama):
    """Ids from the documentation of the sample (a float64 reference)."""
    reference = transformers.LlamaForCausalLM.from_pretrained(story_llama, dtype=torch.float32)
    config = config_of(reference)
    params = from_torch(reference, config)
    ids = [1, 80, 147, 201, 282, 57]
    expected = [313, 598, 303, 1049, 1468, 267, 628, 333, 94, 1210, 263, 251, 604, 94, 1030, 94, 1030, 94, 436, 220]
    whole = np.array([ids + expected])
    predicted = our_logits(config, params, whole)[0].argmax(-1)
    assert predicted[len(ids) - 1 : -1].tolist() == expected


def test_13b_has_the_papers_number_of_trainable_parameters():
    vicuna_13b = LlamaConfig(32000, 5120, 13824, 40, 40, 40, 128)
    assert count(ModelSpec(vicuna_13b, LoraConfig(rank=8, targets=("q_proj", "v_proj"))).lora_shapes) == 6_553_600
    assert count(ModelSpec(vicuna_13b).base_shapes) == 13_015_864_320
