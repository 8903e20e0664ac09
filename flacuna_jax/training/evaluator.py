"""Loss, perplexity and token accuracy on held-out records, all of them and by source, each token weighing the same."""

import dataclasses
import math
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from numpy.typing import NDArray

from flacuna_jax.config.schema import DataConfig, TrainingConfig
from flacuna_jax.data.pipeline import StepSource, plan_epochs
from flacuna_jax.data.store import TokenStore
from flacuna_jax.model.parameters import Params
from flacuna_jax.training.loop import to_devices
from flacuna_jax.training.scoring import Scorer, make_scorer
from flacuna_jax.training.step import StepConfig

ACCUMULATED = 4
"""Micro-batches behind one call."""
NAMED_SOURCES = 31
"""The largest get a line of their own; what is left is "other"."""


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out records laid out in packed rows, ready to be measured; made by `lay_out`."""

    source: StepSource
    steps: int
    names: tuple[str, ...]
    """Of the labels: the records' own sources."""
    labels: NDArray[np.int32]
    score: Scorer
    batch_sharding: NamedSharding

    def measure(self, trainable: Params, frozen: Params, stop: Callable[[], bool]) -> dict[str, float] | None:
        """Loss, perplexity, token accuracy and tokens: "eval/loss", ...; of several sources also "eval/loss/NAME", ...

        Sums are taken on the devices for some rows at a time, and over those in float64. None if `stop` says so
        between two batches.
        """
        totals = np.zeros((3, len(self.names)))
        for step in range(self.steps):
            if stop():
                return None
            batch = to_devices(self.source.labelled(step, self.labels), self.batch_sharding)
            totals += np.stack(
                [np.asarray(s, np.float64) for s in jax.device_get(self.score(trainable, frozen, batch))]
            )
        record = _figures("", totals.sum(axis=1))
        if len(self.names) > 1:
            for name, sums in zip(self.names, totals.T, strict=True):
                record |= _figures(f"/{name}", sums)
        return record


def _figures(suffix: str, sums: NDArray[np.float64]) -> dict[str, float]:
    loss, hits, tokens = sums
    mean = loss / tokens
    return {
        f"eval/loss{suffix}": float(mean),
        f"eval/perplexity{suffix}": math.exp(mean) if mean < 700 else math.inf,
        f"eval/token_accuracy{suffix}": float(hits / tokens),
        f"eval/tokens{suffix}": int(tokens),
    }


def lay_out(
    store: TokenStore,
    data: DataConfig,
    training: TrainingConfig,
    config: StepConfig,
    batch_sharding: NamedSharding,
    shards: int,
) -> HeldOut:
    """Packs held-out records as training packs its own, each once.

    Args:
      store: the records; every one of its source indices belongs to `data.sources`.
      data, training: the run's; how many rows fit on the devices at once is what training found to fit.
      config: the network.
      batch_sharding: of the global batch.
      shards: data×fsdp shards.
    """
    mesh = batch_sharding.mesh
    assert isinstance(mesh, Mesh), "batches are of real devices"
    micro_rows = training.micro_batch_size * shards
    plan = plan_epochs(
        store,
        max_length=data.max_length,
        packing=data.packing,
        weights=(1.0,) * len(data.sources),
        seed=0,
        epochs=1,
        rows_per_step=lambda rows, examples: ACCUMULATED * micro_rows,
        micro_rows=micro_rows,
    )
    names, labels = _label(store)
    return HeldOut(
        source=StepSource(store, plan, jax.process_index(), jax.process_count()),
        steps=plan.total_steps,
        names=names,
        labels=labels,
        score=make_scorer(config, len(names), mesh),
        batch_sharding=batch_sharding,
    )


def _label(store: TokenStore) -> tuple[tuple[str, ...], NDArray[np.int32]]:
    """Names of the sources that the records themselves state, largest first, and which each example has."""
    sizes = np.bincount(store.task_index, weights=store.supervised, minlength=len(store.tasks))
    present = [int(task) for task in np.argsort(-sizes, kind="stable") if sizes[task]]
    named = present if len(present) <= NAMED_SOURCES + 1 else present[:NAMED_SOURCES]
    label_of_task = np.full(len(store.tasks), len(named), np.int32)
    label_of_task[named] = np.arange(len(named))
    names = tuple(store.tasks[task] for task in named) + (() if len(named) == len(present) else ("other",))
    return names, label_of_task[store.task_index]
