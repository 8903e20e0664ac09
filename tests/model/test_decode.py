"""Decoding against transformers' generate, token by token, and against itself in other batches."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from flacuna_jax.config import LoraConfig
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.architecture import read_architecture
from flacuna_jax.huggingface.load import load_base
from flacuna_jax.kernels.packed_mask import make_packed_mask
from flacuna_jax.model import decode
from flacuna_jax.model.decode import Sampling, generate
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.model.sharding import make_mesh, parameter_shardings
from tests.tiny import SMALL, random_params

NO_STOP: frozenset[int] = frozenset()


def _small(**changes: int) -> ModelSpec:
    return ModelSpec(dataclasses.replace(SMALL, **changes), None, "float32", "float32")


def _prompts(lengths: list[int], vocab_size: int = SMALL.vocab_size) -> list[list[int]]:
    rng = np.random.default_rng(3)
    return [rng.integers(3, vocab_size, length).tolist() for length in lengths]


def _is_greedy(spec: ModelSpec, params: dict[str, jax.Array], prompt: list[int], new: list[int]) -> bool:
    """Whether each new token is the most likely one when the whole sequence is run at once, without a cache."""
    ids = jnp.array([prompt + new])
    positions_bt = jnp.arange(ids.shape[1])[None]
    model = spec.merge(params)
    logits_btv = model.logits(model(ids, positions_bt, make_packed_mask(jnp.ones_like(ids))))
    return jnp.argmax(logits_btv[0], -1)[len(prompt) - 1 : -1].tolist() == new


def test_greedy_equals_transformers_token_by_token(story_llama: Path) -> None:
    """Grouped queries, tied embeddings, prompts of mixed lengths in one batch; float32 on both sides."""
    reference = transformers.LlamaForCausalLM.from_pretrained(story_llama, dtype=torch.float32)
    config = read_architecture(story_llama)
    spec = ModelSpec(config, None, "float32", "float32")
    mesh = make_mesh("auto", jax.devices()[:1])
    params = load_base(str(story_llama), config, parameter_shardings(spec.base_shapes, mesh), "float32")
    prompts = [[1, *prompt] for prompt in _prompts([1, 3, 17, 40, 70, 131], config.vocab_size)]

    ours = generate(spec, params, prompts, max_new_tokens=60, stop_ids={2}, batch_size=4)

    for prompt, new in zip(prompts, ours, strict=True):
        inputs = torch.tensor([prompt])
        output = reference.generate(
            inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=60, do_sample=False, pad_token_id=0
        )
        expected = output[0, len(prompt) :].tolist()
        assert new == expected[: expected.index(2) if 2 in expected else None]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_cache_equals_running_everything_again(kv_heads: int) -> None:
    spec = _small(num_kv_heads=kv_heads)
    params = random_params(spec.base_shapes, 0.2)
    prompts = _prompts([1, 5, 33])
    continuations = generate(spec, params, prompts, max_new_tokens=8, stop_ids=NO_STOP)
    assert all(_is_greedy(spec, params, *pair) for pair in zip(prompts, continuations, strict=True))


def test_adapters_take_part() -> None:
    spec = dataclasses.replace(_small(), lora=LoraConfig(rank=2, alpha=4.0, targets=("q_proj", "down_proj")))
    params = random_params(spec.base_shapes | spec.lora_shapes, 0.2)
    (prompt,) = _prompts([7])
    (tuned,) = generate(spec, params, [prompt], max_new_tokens=12, stop_ids=NO_STOP)
    assert _is_greedy(spec, params, prompt, tuned)
    assert not _is_greedy(spec, params, prompt, tuned[::-1])
    zeroed = {name: jnp.zeros_like(leaf) if "lora_b" in name else leaf for name, leaf in params.items()}
    assert generate(spec, zeroed, [prompt], max_new_tokens=12, stop_ids=NO_STOP) != [tuned]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, top_k=20, top_p=0.9)])
def test_a_prompt_gets_the_same_in_any_batch(sampling: Sampling) -> None:
    spec = _small()
    params = random_params(spec.base_shapes, 0.2)
    prompts = _prompts([9, 2, 30, 5, 12])
    kwargs = {"max_new_tokens": 10, "stop_ids": NO_STOP, "sampling": sampling, "seed": 4}
    together = generate(spec, params, prompts, batch_size=5, **kwargs)
    assert generate(spec, params, prompts, batch_size=2, **kwargs) == together
    assert all(len(new) == 10 for new in together)


def test_the_seed_decides_what_is_sampled() -> None:
    spec = _small()
    params = random_params(spec.base_shapes, 0.2)
    prompts = _prompts([6, 6])
    runs = [
        generate(
            spec, params, prompts, max_new_tokens=12, stop_ids=NO_STOP, sampling=Sampling(temperature=1.0), seed=seed
        )
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_equal_prompts_are_sampled_apart() -> None:
    spec = _small()
    params = random_params(spec.base_shapes, 0.05)
    prompts = _prompts([6]) * 4
    new = generate(spec, params, prompts, max_new_tokens=12, stop_ids=NO_STOP, sampling=Sampling(temperature=1.0))
    assert len({tuple(tokens) for tokens in new}) == 4


def test_ends_before_the_stop_id() -> None:
    spec = _small()
    params = random_params(spec.base_shapes, 0.2)
    prompts = _prompts([4, 11])
    free = generate(spec, params, prompts, max_new_tokens=20, stop_ids=NO_STOP)
    stops = {free[0][5], free[1][0]}
    expected = [tokens[: next((i for i, t in enumerate(tokens) if t in stops), None)] for tokens in free]
    assert generate(spec, params, prompts, max_new_tokens=20, stop_ids=stops) == expected
    assert expected[1] == []


@pytest.mark.parametrize(("top_k", "top_p"), [(1, None), (5, None), (None, 0.6), (None, 1.0), (8, 0.3), (500, 0.01)])
def test_filters_keep_what_transformers_keeps(top_k: int | None, top_p: float | None) -> None:
    logits = np.random.default_rng(0).normal(0, 2, (6, 97)).astype(np.float32)
    kept = np.isfinite(np.asarray(decode._keep_likely(jnp.asarray(logits), top_k, top_p)))
    scores = torch.tensor(logits)
    if top_k is not None:
        scores = transformers.TopKLogitsWarper(top_k)(None, scores)
    if top_p is not None:
        scores = transformers.TopPLogitsWarper(top_p)(None, scores)
    np.testing.assert_array_equal(kept, torch.isfinite(scores).numpy())


def test_samples_follow_the_distribution() -> None:
    """4000 draws from five tokens: frequencies within four standard errors of softmax(logits / temperature)."""
    logits_v = jnp.array([1.0, 0.0, -1.0, 2.0, 0.5])
    keys_b = jax.random.split(jax.random.key(0), 4000)
    drawn = decode.choose_tokens(jnp.tile(logits_v, (4000, 1)), keys_b, 3, Sampling(temperature=0.7))
    expected = np.asarray(jax.nn.softmax(logits_v / 0.7))
    frequency = np.bincount(np.asarray(drawn), minlength=5) / 4000
    assert np.all(np.abs(frequency - expected) < 4 * np.sqrt(expected * (1 - expected) / 4000))


def test_one_compilation_for_similar_lengths() -> None:
    spec = _small()
    params = random_params(spec.base_shapes, 0.2)
    before = decode._decode._cache_size()
    for lengths in ([3, 9, 20, 31, 7], [4, 4, 50]):
        generate(spec, params, _prompts(lengths), max_new_tokens=4, stop_ids={2}, batch_size=2)
    assert decode._decode._cache_size() == before + 1


def test_prompts_must_fit() -> None:
    spec = _small(max_position_embeddings=32)
    params = random_params(spec.base_shapes, 0.2)
    with pytest.raises(UserError, match=r"prompt 2 is empty"):
        generate(spec, params, [[5], []], max_new_tokens=4, stop_ids={2})
    with pytest.raises(
        UserError, match=r"prompt 1 has 30 tokens; with 4 new ones it exceeds the model's context of 32"
    ):
        generate(spec, params, _prompts([30]), max_new_tokens=4, stop_ids={2})
    assert len(generate(spec, params, _prompts([28]), max_new_tokens=4, stop_ids=NO_STOP)[0]) == 4


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_sampling_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        Sampling(**bad)
