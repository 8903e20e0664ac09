"""Objectives: the loss that a step minimises, and the measures that an evaluation computes.

An objective is defined on micro-batches, and its terms are sums: the step adds them over all micro-batches and devices
and divides once, so the result does not depend on the split into micro-batches. Each scalar of the objective is logged
under its name, which metrics.jsonl, the trackers and the report take from here.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flacuna_jax.training.network import Batch, Network


class Weighted(NamedTuple):
    """A sum over a micro-batch and the total weight to divide it by: float32 scalars.

    Counts are float32, too, so that XLA adds up sum and weight over the devices in one exchange; they are exact below
    2^24. No gradient passes through the weight.
    """

    sum: jax.Array
    weight: jax.Array

    @property
    def divisor(self) -> jax.Array:
        """The weight, or 1 if the weight is 0."""
        return jnp.where(self.weight > 0, self.weight, 1.0)

    def mean(self) -> jax.Array:
        """sum / weight; the sum itself if the weight is 0."""
        return self.sum / self.divisor


class Terms(NamedTuple):
    """The results of an objective on a micro-batch."""

    loss: Weighted
    scalars: Mapping[str, Weighted]
    """Further values to log, by name; no gradient is taken of them."""


class Measures(NamedTuple):
    """The results of an objective per token, which an evaluation sums by source or by example."""

    values_bt: Mapping[str, jax.Array]
    """By name, float32 or int32 [batch, length], zero where `counted_bt` is False. One of them is "loss"."""
    counted_bt: jax.Array
    """Bool [batch, length]: the tokens over which the values are averaged."""


Statistics = Callable[[Network, Batch], Mapping[str, Weighted]]


class Leaf(NamedTuple):
    """Name and dtype of an array of the batch."""

    name: str
    dtype: str


@dataclasses.dataclass(frozen=True)
class Objective:
    """An objective. Hashable, so that it can be a static argument of a jitted function.

    Args:
      leaves: the arrays of a batch, each [accumulation, batch, length]; among them `segment_ids`, 0 in padding.
      terms: (network, micro-batch) → the loss and other scalars of one micro-batch.
      measures: (network, micro-batch) → per-token results for an evaluation. Dropout is off.
      derived: means of an evaluation by name → the figures to log.
      statistics: (network, micro-batch) → sums over a micro-batch by name. Their means over the whole step are computed
        before the loss, without gradient and dropout; `terms` and `measures` find them in the micro-batch under these
        names, as scalars. In an evaluation, they are means over all held-out records. None if there are none.
      counted: what `Measures.counted_bt` counts.
      forwards: forward passes of a step in addition to that of the loss.
    """

    leaves: tuple[Leaf, ...]
    terms: Callable[[Network, Batch], Terms]
    measures: Callable[[Network, Batch], Measures]
    derived: Callable[[Mapping[str, float]], dict[str, float]] = dict
    statistics: Statistics | None = None
    counted: str = "tokens"
    forwards: int = 0

    @property
    def name(self) -> str:
        """Where `terms` is defined, by which a resumed run knows its objective."""
        return f"{self.terms.__module__}.{self.terms.__qualname__}"


def _token_terms(network: Network, batch: Batch) -> Terms:
    count = jnp.sum(batch["loss_mask"], dtype=jnp.float32)
    return Terms(Weighted(jnp.sum(network.token_losses(batch)), count), {})


def _token_measures(network: Network, batch: Batch) -> Measures:
    losses_bt, hits_bt = network.token_scores(batch)
    return Measures({"loss": losses_bt, "token_accuracy": hits_bt.astype(jnp.int32)}, batch["loss_mask"])


def _perplexity(means: Mapping[str, float]) -> dict[str, float]:
    return {**means, "perplexity": math.exp(means["loss"]) if means["loss"] < 700 else math.inf}


PACKED_ROWS = (
    *(Leaf(name, "int32") for name in ("tokens", "targets", "segment_ids", "positions")),
    Leaf("loss_mask", "bool"),
)
"""Leaves of packed instruction data: `targets` are the next tokens, `loss_mask` marks those that are supervised."""

SUPERVISED_TOKENS = Objective(PACKED_ROWS, _token_terms, _token_measures, _perplexity)
"""Mean cross-entropy of the supervised tokens, with equal weight per token."""
