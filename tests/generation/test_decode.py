"""Choice of tokens, against transformers' filters and against the distribution."""

from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flacuna_jax.errors import UserError
from flacuna_jax.generation import decode
from flacuna_jax.generation.decode import RowSampling
from flacuna_jax.generation.settings import Sampling


@pytest.mark.parametrize(("top_k", "top_p"), [(1, None), (5, None), (None, 0.6), (None, 1.0), (8, 0.3), (500, 0.01)])
def test_filters_keep_what_transformers_keeps(
    top_k: int | None, top_p: float | None, torch: ModuleType, transformers: ModuleType
) -> None:
    logits = np.random.default_rng(0).normal(0, 2, (6, 97)).astype(np.float32)
    settings = RowSampling.of([Sampling(1.0, top_k, top_p)] * 6)
    kept = np.isfinite(np.asarray(decode._keep_likely(jnp.asarray(logits), settings.top_k_b, settings.top_p_b)))
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
    warm = RowSampling.of([Sampling(temperature=0.7)] * 4000)
    drawn = decode.choose_tokens(jnp.tile(logits_v, (4000, 1)), keys_b, warm, "sampled")
    expected = np.asarray(jax.nn.softmax(logits_v / 0.7))
    frequency = np.bincount(np.asarray(drawn), minlength=5) / 4000
    assert np.all(np.abs(frequency - expected) < 4 * np.sqrt(expected * (1 - expected) / 4000))


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = np.random.default_rng(1).integers(0, 6, (40, 30)).astype(np.float32)  # ties in every row
    logits[0] = -np.inf
    keys_b = jax.random.split(jax.random.key(0), 40)
    greedy = RowSampling.of([Sampling()] * 40)
    taken = np.asarray(decode.choose_tokens(jnp.asarray(logits), keys_b, greedy, "greedy"))
    np.testing.assert_array_equal(taken, logits.argmax(axis=1))
    assert 0 <= int(decode.choose_tokens(jnp.full((1, 30), jnp.nan), keys_b[:1], greedy, "greedy")[0]) < 30


def test_each_row_has_its_own_settings() -> None:
    """Greedy rows, and rows with one possible token after filters, between rows that are sampled."""
    logits = np.random.default_rng(2).normal(0, 1, (60, 50)).astype(np.float32)
    kinds = [Sampling(), Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-6), Sampling(1.0), Sampling(2.0, 5, 0.9)]
    settings = [kinds[row % len(kinds)] for row in range(60)]
    keys_b = jax.random.split(jax.random.key(0), 60)
    method = decode.most_general(settings)
    taken = np.asarray(decode.choose_tokens(jnp.asarray(logits), keys_b, RowSampling.of(settings), method))
    fixed = np.arange(60) % len(kinds) < 3
    np.testing.assert_array_equal(taken[fixed], logits.argmax(1)[fixed])
    assert np.any(taken[~fixed] != logits.argmax(1)[~fixed])
    for row in np.flatnonzero(np.arange(60) % len(kinds) == 4):
        assert logits[row, taken[row]] >= np.sort(logits[row])[-5]


def test_log_probabilities_equal_those_of_torch(torch: ModuleType) -> None:
    logits = np.random.default_rng(3).normal(0, 3, (4, 50)).astype(np.float32)
    token_b = np.array([3, 0, 49, 7], np.int32)
    found = decode.log_probabilities(jnp.asarray(logits), jnp.asarray(token_b), 5)
    expected = torch.log_softmax(torch.tensor(logits), dim=-1)
    values, tokens = expected.topk(5)
    # float32; a logsumexp of 50 terms in another order.
    np.testing.assert_allclose(found.of_token_b, expected[np.arange(4), token_b].numpy(), atol=2e-6)
    np.testing.assert_allclose(found.of_tokens_ba, values.numpy(), atol=2e-6)
    np.testing.assert_array_equal(found.tokens_ba, tokens.numpy())


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
