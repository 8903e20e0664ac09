"""Choice of tokens, against transformers' filters and against the distribution."""

from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flacuna_jax.errors import UserError
from flacuna_jax.generation import decode
from flacuna_jax.generation.decode import Sampling


@pytest.mark.parametrize(("top_k", "top_p"), [(1, None), (5, None), (None, 0.6), (None, 1.0), (8, 0.3), (500, 0.01)])
def test_filters_keep_what_transformers_keeps(
    top_k: int | None, top_p: float | None, torch: ModuleType, transformers: ModuleType
) -> None:
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


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = np.random.default_rng(1).integers(0, 6, (40, 30)).astype(np.float32)  # ties in every row
    logits[0] = -np.inf
    keys_b = jax.random.split(jax.random.key(0), 40)
    taken = np.asarray(decode.choose_tokens(jnp.asarray(logits), keys_b, 0, Sampling()))
    np.testing.assert_array_equal(taken, logits.argmax(axis=1))
    assert 0 <= int(decode.choose_tokens(jnp.full((1, 30), jnp.nan), keys_b[:1], 0, Sampling())[0]) < 30


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
    ],
)
def test_invalid_sampling_settings_are_errors(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        Sampling(**bad)
