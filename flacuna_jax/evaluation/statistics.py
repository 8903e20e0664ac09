"""Statistics of results: bootstrap intervals for one model, paired tests for two models on the same problems."""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from flacuna_jax.errors import UserError
from flacuna_jax.evaluation.results import TaskResult

RESAMPLES = 10_000
CHUNK = 256
"""Number of resamples drawn at once, to limit memory."""


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Difference of two models on the same problems, `second - first`, in the task's scale; two-sided `p_value`."""

    mean: float
    interval: Interval
    p_value: float
    test: str


def confidence_interval(result: TaskResult, score: str, level: float = 0.95, seed: int = 0) -> Interval:
    """Percentile bootstrap over problems; for macro averages, problems are drawn within groups."""
    result = result.scored(score)
    if not result.outcomes:
        return Interval(math.nan, math.nan)
    return _bootstrap(result.values(score) * result.scale, result, level, seed)


def difference(first: TaskResult, second: TaskResult, score: str, level: float = 0.95, seed: int = 0) -> Difference:
    """Compares two results problem by problem.

    Scores of only 0 and 1 with a micro average use the exact McNemar test, others a permutation test that flips the
    signs of the problems' weighted differences.

    Raises:
      UserError: the results have different problems.
    """
    _check_paired(first, second)
    both = [
        a.scores.get(score) is not None and b.scores.get(score) is not None
        for a, b in zip(first.outcomes, second.outcomes, strict=True)
    ]
    first, second = (
        replace(result, outcomes=tuple(outcome for outcome, kept in zip(result.outcomes, both, strict=True) if kept))
        for result in (first, second)
    )
    if not any(both):
        return Difference(math.nan, Interval(math.nan, math.nan), 1.0, "nothing in common")
    d = (second.values(score) - first.values(score)) * second.scale
    interval = _bootstrap(d, second, level, seed)
    mean = float(d @ second.weights())
    is_binary = set(np.unique(np.concatenate([first.values(score), second.values(score)]))) <= {0.0, 1.0}
    if is_binary and second.average == "micro":
        return Difference(mean, interval, mcnemar(int((d > 0).sum()), int((d < 0).sum())), "exact McNemar")
    return Difference(mean, interval, _sign_flips(d * second.weights(), seed), "paired permutation")


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact test of equal probabilities to gain and lose a problem: Binomial(gained + lost, 1/2)."""
    n, k = gained + lost, min(gained, lost)
    if n == 0:
        return 1.0
    # Summed from the smallest term up, in logarithms, as 2^-n underflows for large n.
    log_terms = [
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2) for i in range(k + 1)
    ]
    return min(1.0, 2 * math.fsum(math.exp(term) for term in log_terms))


def _check_paired(first: TaskResult, second: TaskResult) -> None:
    if [o.id for o in first.outcomes] != [o.id for o in second.outcomes] or first.shots != second.shots:
        raise UserError(
            f"{first.task}: {first.model} and {second.model} were not scored on the same problems; "
            "evaluate both on the same data with the same shots"
        )


def _bootstrap(values: NDArray[np.float64], result: TaskResult, level: float, seed: int) -> Interval:
    rng = np.random.default_rng(seed)
    if result.average == "micro":
        strata = [np.arange(len(values))]
    else:
        groups = np.array([outcome.group for outcome in result.outcomes])
        strata = [np.flatnonzero(groups == group) for group in result.groups]
    means = np.zeros(RESAMPLES)
    for members in strata:
        for begin in range(0, RESAMPLES, CHUNK):
            count = min(CHUNK, RESAMPLES - begin)
            drawn = rng.integers(0, len(members), (count, len(members)))
            means[begin : begin + count] += values[members][drawn].mean(axis=1) / len(strata)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def _sign_flips(weighted: NDArray[np.float64], seed: int) -> float:
    weighted = weighted[weighted != 0]
    if not weighted.size:
        return 1.0
    rng = np.random.default_rng(seed)
    observed = abs(weighted.sum()) - 1e-12  # so that rounding does not separate equal sums
    extreme = 0
    for begin in range(0, RESAMPLES, CHUNK):
        signs = rng.integers(0, 2, (min(CHUNK, RESAMPLES - begin), weighted.size)) * 2.0 - 1.0
        extreme += int((np.abs(signs @ weighted) >= observed).sum())
    return (extreme + 1) / (RESAMPLES + 1)
