"""Loss and accuracy of labelled tokens, without gradients: what evaluation measures, and which example a loss is from.

Only sums leave the device, one per label; neither logits nor losses of tokens are ever kept.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flacuna_jax.kernels.cross_entropy import token_scores
from flacuna_jax.model.parameters import Params
from flacuna_jax.model.sharding import constrain
from flacuna_jax.training.step import Batch, StepConfig, micro_batch_losses


class Sums(NamedTuple):
    """Over the supervised targets of each label: float32 loss, int32 hits (targets that no token beats), int32 tokens.
    Each [labels]."""

    loss: jax.Array
    hits: jax.Array
    tokens: jax.Array


Scorer = Callable[[Params, Params, Batch], Sums]
"""(trainable, frozen, batch with `labels`) → sums, readable on every host."""


def make_scorer(config: StepConfig, labels: int, mesh: Mesh) -> Scorer:
    """Compiles nothing yet. Dropout is off; labels below 0 count nowhere.

    Args:
      config: the network and its settings, as for the step.
      labels: how many there are.
      mesh: where the parameters are.
    """

    def score(trainable: Params, frozen: Params, batch: Batch) -> Sums:
        params = {**frozen, **trainable}

        def add(index: jax.Array, sums: Sums) -> Sums:
            micro_batch = {name: constrain(leaf[index], "batch", None) for name, leaf in batch.items()}
            losses_bt, hits_bt = micro_batch_losses(config, params, micro_batch, score=token_scores)
            counted_bt = micro_batch["loss_mask"]
            # Tokens without loss go to one label more, which is dropped.
            labels_bt = jnp.where(counted_bt & (micro_batch["labels"] >= 0), micro_batch["labels"], labels)

            def by_label(values_bt: jax.Array) -> jax.Array:
                flat = (values_bt.reshape(-1), labels_bt.reshape(-1))
                return jax.ops.segment_sum(*flat, num_segments=labels + 1)[:labels]

            here = Sums(*(by_label(x) for x in (losses_bt, hits_bt.astype(jnp.int32), counted_bt.astype(jnp.int32))))
            return jax.tree.map(jnp.add, sums, here)

        counts = jnp.zeros(labels, jnp.int32)
        zeros = Sums(jnp.zeros(labels, jnp.float32), counts, counts)
        return jax.lax.fori_loop(0, batch["tokens"].shape[0], add, zeros)

    jitted = jax.jit(score, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def on_mesh(trainable: Params, frozen: Params, batch: Batch) -> Sums:
        with jax.set_mesh(mesh):
            return jitted(trainable, frozen, batch)

    return on_mesh
