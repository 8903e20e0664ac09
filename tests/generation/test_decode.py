"""Choice of tokens, against transformers' filters and against the distribution."""

from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flacuna_jax.errors import UserError
from flacuna_jax.generation import decode
from flacuna_jax.generation.decode import RowSampling
from flacuna_jax.generation.settings import METHODS, Sampling

GREEDILY, SAMPLED = METHODS.index("greedy"), METHODS.index("sampled")


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
    drawn = decode.choose_tokens(jnp.tile(logits_v, (4000, 1)), keys_b, warm, SAMPLED)
    expected = np.asarray(jax.nn.softmax(logits_v / 0.7))
    frequency = np.bincount(np.asarray(drawn), minlength=5) / 4000
    assert np.all(np.abs(frequency - expected) < 4 * np.sqrt(expected * (1 - expected) / 4000))


def test_samples_of_a_large_vocabulary_follow_the_distribution() -> None:
    """Three groups of tokens that are summed together, the last one not whole; impossible tokens are never drawn."""
    size = 2 * decode.DRAWN_TOGETHER + 100
    logits = np.random.default_rng(4).normal(0, 2, size)
    logits[[0, 255, 256, 400, size - 1]] = -np.inf
    logits[300:310] = -np.inf
    keys_b = jax.random.split(jax.random.key(1), 20000)
    warm = RowSampling.of([Sampling(temperature=1.0)] * 20000)
    drawn = decode.choose_tokens(
        jnp.tile(logits.astype(np.float32), (20000, 1)), keys_b, warm, METHODS.index("sampled")
    )
    expected = np.asarray(jax.nn.softmax(logits))
    count = np.bincount(np.asarray(drawn), minlength=size)
    assert count[expected == 0].sum() == 0
    frequent = expected * 20000 > 25
    # Of about 100 tokens, each within five standard errors.
    error = np.sqrt(20000 * expected * (1 - expected))
    assert frequent.sum() > 50
    assert np.all(np.abs(count - 20000 * expected)[frequent] < 5 * error[frequent])


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2**-24, 1.0])
def test_the_ends_of_the_uniform_range_draw_possible_tokens(uniform: float) -> None:
    end_bi = jnp.cumsum(jnp.array([[0.0, 0.0, 0.1, 0.0, 0.3, 0.0]]), axis=-1)
    found, _ = decode._first_above(end_bi, uniform * end_bi[:, -1])
    assert int(found[0]) == (2 if uniform == 0 else 4)


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = np.random.default_rng(1).integers(0, 6, (40, 30)).astype(np.float32)  # ties in every row
    logits[0] = -np.inf
    keys_b = jax.random.split(jax.random.key(0), 40)
    greedy = RowSampling.of([Sampling()] * 40)
    taken = np.asarray(decode.choose_tokens(jnp.asarray(logits), keys_b, greedy, GREEDILY))
    np.testing.assert_array_equal(taken, logits.argmax(axis=1))
    nan = decode.choose_tokens(jnp.full((40, 30), jnp.nan), keys_b, greedy, GREEDILY)
    assert 0 <= int(nan.min()) <= int(nan.max()) < 30


def test_each_row_has_its_own_settings() -> None:
    """Greedy rows, and rows with one possible token after filters, between rows that are sampled."""
    logits = np.random.default_rng(2).normal(0, 1, (60, 50)).astype(np.float32)
    kinds = [Sampling(), Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-6), Sampling(1.0), Sampling(2.0, 5, 0.9)]
    settings = [kinds[row % len(kinds)] for row in range(60)]
    keys_b = jax.random.split(jax.random.key(0), 60)
    method = METHODS.index(decode.most_general(settings))
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
