"""Sums of an objective's measures by label, without gradients: by source for evaluation, by example for inspecting a
step.

Only the sums leave the device; logits and losses of single tokens are not kept.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flacuna_jax.model.parameters import Params
from flacuna_jax.training.network import Batch
from flacuna_jax.training.objective import Measures, Weighted
from flacuna_jax.training.step import StepConfig, micro_batch_of, sum_statistics


class Sums(NamedTuple):
    """Sums over the counted tokens of each label, each [labels]."""

    values: dict[str, jax.Array]
    """Sums of `Measures.values_bt` by name, in the same dtypes."""
    tokens: jax.Array
    """Number of counted tokens, int32."""


Means = Mapping[str, jax.Array]
"""Means of the objective's statistics by name."""


_NONE: Means = {}


class Scorer(Protocol):
    """(trainable, frozen, batch with the additional int32 leaf `labels`, means of the objective's statistics) → sums,
    readable on every host."""

    def __call__(self, trainable: Params, frozen: Params, batch: Batch, statistics: Means = ...) -> Sums: ...


def make_scorer(config: StepConfig, labels: int, mesh: Mesh) -> Scorer:
    """Returns a jitted scorer, not yet compiled. Dropout is off; tokens with a label below 0 are not counted.

    Args:
      config: the network and the objective.
      labels: number of labels.
      mesh: the mesh of the parameters.
    """

    def score(trainable: Params, frozen: Params, batch: Batch, statistics: Means) -> Sums:
        network = config.network.with_params({**frozen, **trainable})

        def of_micro_batch(index: jax.Array) -> Sums:
            micro_batch = micro_batch_of(batch, index)
            measures: Measures = config.objective.measures(network, {**micro_batch, **statistics})
            # Tokens that are not counted get an additional label, whose sum is dropped.
            counted_bt = measures.counted_bt & (micro_batch["labels"] >= 0)
            labels_bt = jnp.where(counted_bt, micro_batch["labels"], labels)

            def by_label(values_bt: jax.Array) -> jax.Array:
                flat = (values_bt.reshape(-1), labels_bt.reshape(-1))
                return jax.ops.segment_sum(*flat, num_segments=labels + 1)[:labels]

            values = {name: by_label(values_bt) for name, values_bt in measures.values_bt.items()}
            return Sums(values, by_label(measures.counted_bt.astype(jnp.int32)))

        def add(index: jax.Array, sums: Sums) -> Sums:
            return jax.tree.map(jnp.add, sums, of_micro_batch(index))

        zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(of_micro_batch, jax.ShapeDtypeStruct((), jnp.int32)))
        return jax.lax.fori_loop(0, batch["labels"].shape[0], add, zeros)

    jitted = jax.jit(score, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def on_mesh(trainable: Params, frozen: Params, batch: Batch, statistics: Means = _NONE) -> Sums:
        with jax.set_mesh(mesh):
            return jitted(trainable, frozen, batch, dict(statistics))

    return on_mesh


def make_statistics(config: StepConfig, mesh: Mesh) -> Callable[[Params, Params, Batch], Mapping[str, Weighted]]:
    """Returns a jitted function of (trainable, frozen, batch): the sums of the objective's statistics, as `Scorer`
    needs their means."""

    def statistics(trainable: Params, frozen: Params, batch: Batch) -> Mapping[str, Weighted]:
        network = config.network.with_params({**frozen, **trainable})
        return sum_statistics(config.objective, network, batch, batch["segment_ids"].shape[0])

    jitted = jax.jit(statistics, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def on_mesh(trainable: Params, frozen: Params, batch: Batch) -> Mapping[str, Weighted]:
        with jax.set_mesh(mesh):
            return jitted(trainable, frozen, batch)

    return on_mesh
