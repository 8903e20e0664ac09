"""Evaluates the objective's measures on held-out records: token-weighted means over all records and by source."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from numpy.typing import NDArray

from flacuna_jax.config.data import DataConfig
from flacuna_jax.config.training import TrainingConfig
from flacuna_jax.data.pipeline import StepSource, plan_epochs
from flacuna_jax.data.store import TokenStore
from flacuna_jax.model.parameters import Params
from flacuna_jax.training.loop import to_devices
from flacuna_jax.training.network import Batch
from flacuna_jax.training.objective import Objective, Weighted
from flacuna_jax.training.scoring import Scorer, Sums, make_scorer, make_statistics
from flacuna_jax.training.step import StepConfig

ACCUMULATED = 4
"""Maximum number of micro-batches per call."""
NAMED_SOURCES = 31
"""Number of largest sources that are reported separately; the rest is reported as "other"."""


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out records in packed rows, ready for evaluation; created by `lay_out`."""

    source: StepSource
    steps: int
    names: tuple[str, ...]
    """Names of the labels: the sources that the records state."""
    labels: NDArray[np.int32]
    score: Scorer
    statistics: Callable[[Params, Params, Batch], Mapping[str, Weighted]]
    objective: Objective
    batch_sharding: NamedSharding

    def measure(self, trainable: Params, frozen: Params, stop: Callable[[], bool]) -> dict[str, float] | None:
        """Means of the objective's measures, "eval/loss", ..., and their number, "eval/tokens", over all records.

        If the records have several sources, also "eval/loss/SOURCE", ... The devices sum a few rows at a time in
        float32, and the host adds these sums in float64. Returns None if `stop` returns True between two batches.
        """
        means: dict[str, Any] = {}
        if self.objective.statistics is not None:
            sums = self._total(lambda batch: self.statistics(trainable, frozen, batch), stop)
            if sums is None:
                return None
            means = {name: np.float32(found.sum / max(found.weight, 1)) for name, found in sums.items()}
        totals = self._total(lambda batch: self.score(trainable, frozen, batch, means), stop)
        if totals is None:
            return None
        record = self._figures("", jax.tree.map(np.sum, totals))
        if len(self.names) > 1:
            for label, name in enumerate(self.names):
                record |= self._figures(f"/{name}", jax.tree.map(lambda leaf, label=label: leaf[label], totals))
        return record

    def _total(self, function: Callable[[Batch], Any], stop: Callable[[], bool]) -> Any:
        """The results of all batches, added up in float64; None if `stop` returns True."""
        total = None
        for step in range(self.steps):
            if stop():
                return None
            batch = to_devices(self.source.labelled(step, self.labels), self.batch_sharding)
            found = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), jax.device_get(function(batch)))
            total = found if total is None else jax.tree.map(np.add, total, found)
        return total

    def _figures(self, suffix: str, sums: Sums) -> dict[str, float]:
        means = {name: float(value / sums.tokens) for name, value in sums.values.items()}
        figures = {**self.objective.derived(means), self.objective.counted: int(sums.tokens)}
        return {f"eval/{name}{suffix}": value for name, value in figures.items()}


def lay_out(
    store: TokenStore,
    data: DataConfig,
    training: TrainingConfig,
    config: StepConfig,
    batch_sharding: NamedSharding,
    shards: int,
) -> HeldOut:
    """Packs held-out records like training records, each record once.

    Args:
      store: the records; every one of its source indices belongs to `data.sources`.
      data, training: settings of the run; a micro-batch has as many rows as in training.
      config: the network and the objective.
      batch_sharding: sharding of the global batch.
      shards: number of data×fsdp shards.
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
        statistics=make_statistics(config, mesh),
        objective=config.objective,
        batch_sharding=batch_sharding,
    )


def _label(store: TokenStore) -> tuple[tuple[str, ...], NDArray[np.int32]]:
    """Names of the sources that the records state, largest first, and the label of each example."""
    sizes = np.bincount(store.task_index, weights=store.supervised, minlength=len(store.tasks))
    present = [int(task) for task in np.argsort(-sizes, kind="stable") if sizes[task]]
    named = present if len(present) <= NAMED_SOURCES + 1 else present[:NAMED_SOURCES]
    label_of_task = np.full(len(store.tasks), len(named), np.int32)
    label_of_task[named] = np.arange(len(named))
    names = tuple(store.tasks[task] for task in named) + (() if len(named) == len(present) else ("other",))
    return names, label_of_task[store.task_index]
