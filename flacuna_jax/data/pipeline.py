"""From the token store to batches: the number of steps of a run, the rows of each step, and its arrays.

`plan_steps` fixes every number before the first step. `StepSource` is random access: the rows and the batch of any step
are a function of (store, plan, step), with no state but a cache. `BatchStream` serves them through Grain with threads
that work ahead, from any step on and on any number of hosts.
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flacuna_jax.config.data import DataConfig
from flacuna_jax.config.objectives import KtoConfig
from flacuna_jax.config.training import TrainingConfig
from flacuna_jax.data.packing import PackingMethod, PackPlan, epoch_examples, pack
from flacuna_jax.data.preferences import check_labels
from flacuna_jax.data.store import TokenStore
from flacuna_jax.errors import UserError

Batch = dict[str, NDArray[Any]]
"""tokens, targets, segment_ids, positions: int32, loss_mask: bool, each [accumulation, batch, length].

tokens are inputs; targets[..., t] is the next token of the same document, or 0 at its end; loss_mask is True for
targets with loss; segment_ids number the documents of each row from 1, 0 is padding; positions start at 0 in each
document.

Examples of two documents have those next to each other, the first with an odd segment id. Values of an example or of a
document are constant over its tokens: `good`, bool, the label; `reference`, float32, the document's log-probability
under the reference.
"""


class EpochPlan(NamedTuple):
    examples: int
    rows: int
    tokens: int
    steps: int
    first_step: int
    examples_of_step: tuple[int, int]
    """The smallest and the largest number of examples in a whole step."""


@dataclass(frozen=True)
class RunPlan:
    """The arithmetic of a run, exact for every epoch.

    Row i of a step (0 <= i < rows_per_step) is at index divmod(i, micro_rows) of the batch's first two axes. Empty rows
    fill the last micro-batch and the last step of an epoch.
    """

    seed: int
    max_length: int
    packing: PackingMethod
    weights: tuple[float, ...]
    rows_per_step: int
    micro_rows: int
    """Rows of one forward and backward pass on the whole mesh: micro_batch_size × shards."""
    accumulation: int
    epochs: tuple[EpochPlan, ...]
    total_steps: int
    """Where the run ends: after all epochs, or at max_steps."""
    warnings: tuple[str, ...] = ()

    @property
    def examples(self) -> int:
        """Number of examples in the first epoch."""
        return self.epochs[0].examples

    @property
    def rows(self) -> int:
        """Number of packed rows in the first epoch."""
        return self.epochs[0].rows

    @property
    def fill(self) -> float:
        """Fraction of the first epoch's rows that is tokens, not padding."""
        return self.epochs[0].tokens / (self.rows * self.max_length)

    @property
    def examples_per_step(self) -> float:
        """The mean over the steps of the first epoch."""
        return self.examples * min(self.rows_per_step, self.rows) / self.rows

    @property
    def examples_of_a_step(self) -> str:
        """The number of examples in a whole step, for messages: the same in all, or their range and mean."""
        fewest, most = self.epochs[0].examples_of_step
        return f"{most:,}" if fewest == most else f"{fewest:,} to {most:,} (mean {self.examples_per_step:,.1f})"

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, step within the epoch) of a step, counted from 0. Raises IndexError after the end of the run."""
        if 0 <= step < self.total_steps:
            for epoch, plan in enumerate(self.epochs):
                if step < plan.first_step + plan.steps:
                    return epoch, step - plan.first_step
        raise IndexError(f"step {step} of a run of {self.total_steps}")


def plan_steps(
    store: TokenStore, data: DataConfig, training: TrainingConfig, *, seed: int, shards: int | None
) -> RunPlan:
    """The plan of a run over `shards` data×fsdp shards.

    None: the devices are not known. Then micro-batches are of one row; steps and rows per step do not depend on it.
    Raises UserError where the config's numbers do not go together, naming the keys, and if KTO has only one label.
    """
    if shards is not None:
        check_batch_arithmetic(training, shards)
    plan = plan_epochs(
        store,
        max_length=data.max_length,
        packing=data.packing,
        weights=tuple(source.weight for source in data.sources),
        seed=seed,
        epochs=training.epochs,
        max_steps=training.max_steps,
        rows_per_step=lambda rows, examples: _rows_per_step(training, rows, examples),
        micro_rows=1 if shards is None else training.micro_batch_size * shards,
    )
    _check_schedule(training, plan)
    warnings = _warnings(training, plan.epochs[0])
    if store.good is not None and isinstance(training.objective, KtoConfig):
        warnings += check_labels(store.good, training.objective)
    return replace(plan, warnings=warnings)


def plan_epochs(
    store: TokenStore,
    *,
    max_length: int,
    packing: PackingMethod,
    weights: tuple[float, ...],
    seed: int,
    epochs: int,
    rows_per_step: Callable[[int, int], int],
    micro_rows: int,
    max_steps: int | None = None,
) -> RunPlan:
    """A plan by plain numbers.

    Args:
      store: the corpus; `weights` has one for each of its sources.
      rows_per_step: from rows and examples of the first epoch; no step has more rows than the longest epoch.
      micro_rows: rows of one forward and backward pass on the whole mesh.

    Raises:
      UserError: the weights leave no example in an epoch.
    """
    lengths = store.lengths
    planned: list[EpochPlan] = []
    rows_of_step = steps = 0
    for epoch in range(epochs):
        examples = epoch_examples(store.source_index, weights, seed, epoch)
        if not len(examples):
            raise UserError("data.sources: with these weights, an epoch has no example")
        packed = pack(lengths[examples], max_length, packing, seed, epoch)
        rows_of_step = rows_of_step or rows_per_step(packed.rows, len(examples))
        epoch_steps = -(-packed.rows // rows_of_step)
        tokens, per_step = int(lengths[examples].sum()), _examples_of_step(packed, rows_of_step)
        planned.append(EpochPlan(len(examples), packed.rows, tokens, epoch_steps, steps, per_step))
        steps += epoch_steps
        if max_steps is not None and steps >= max_steps:
            steps = max_steps
            break
    # A batch larger than the data is every epoch in one step, and no more memory than that.
    rows_of_step = min(rows_of_step, max(epoch.rows for epoch in planned))
    return RunPlan(
        seed=seed,
        max_length=max_length,
        packing=packing,
        weights=weights,
        rows_per_step=rows_of_step,
        micro_rows=micro_rows,
        accumulation=-(-rows_of_step // micro_rows),
        epochs=tuple(planned),
        total_steps=steps,
    )


def _examples_of_step(packed: PackPlan, rows_per_step: int) -> tuple[int, int]:
    """The smallest and the largest number of examples in a whole step, or in all rows if they do not fill a step."""
    ends = packed.row_offsets[::rows_per_step]
    counts = np.diff(ends if len(ends) > 1 else packed.row_offsets[[0, -1]])
    return int(counts.min()), int(counts.max())


def _check_schedule(training: TrainingConfig, plan: RunPlan) -> None:
    """Raises UserError if the phases of the learning rate are longer than the run."""
    steps = plan.total_steps
    size = f"the run of {steps} steps ({plan.rows} rows per epoch, {plan.rows_per_step} rows per step)"
    warmup = training.warmup_of(steps)
    if warmup >= steps and warmup:
        raise UserError(
            f"training.warmup_steps {warmup} is not shorter than {size}; training.warmup_ratio: 0.03 suits any length"
        )
    if training.decay_steps is not None and warmup + training.decay_steps > steps:
        raise UserError(
            f"{warmup} steps of warm-up and training.decay_steps {training.decay_steps} together are longer than {size}"
        )


def check_batch_arithmetic(training: TrainingConfig, shards: int) -> None:
    """Raises UserError if the config fixes the rows per step to a number that is not divisible; needs no data."""
    micro_rows = training.micro_batch_size * shards
    if training.batch_unit == "rows" and training.batch_size % micro_rows:
        raise UserError(
            f"training.batch_size {training.batch_size} with training.batch_unit: rows must be a multiple of "
            f"{micro_rows} = training.micro_batch_size {training.micro_batch_size} × {shards} data×fsdp shards of the "
            "mesh; with batch_unit: examples, any number is valid"
        )


def _rows_per_step(training: TrainingConfig, rows: int, examples: int) -> int:
    if training.batch_unit == "rows":
        return training.batch_size
    return -(-training.batch_size * rows // examples)


def _warnings(training: TrainingConfig, first: EpochPlan) -> tuple[str, ...]:
    if training.batch_size > (first.rows if training.batch_unit == "rows" else first.examples):
        return (
            f"training.batch_size {training.batch_size} is more than an epoch has ({first.examples} examples in "
            f"{first.rows} rows): every step is an epoch",
        )
    unpacked_steps = -(-first.examples // training.batch_size)
    if unpacked_steps > 2 * first.steps:
        return (
            f"with packing, an epoch has {first.steps} optimizer steps instead of {unpacked_steps}; "
            "training.batch_unit: examples keeps their number",
        )
    return ()


class StepInfo(NamedTuple):
    """The contents of a step on all hosts. `example_indices`: int64, indices into the store, row by row."""

    epoch: int
    example_indices: NDArray[np.int64]
    examples: int
    rows: int
    tokens: int
    supervised_tokens: int
    fill: float


class StepSource:
    """Random access to the steps of a run for one host; a Grain data source. Safe to use from several threads."""

    def __init__(self, store: TokenStore, plan: RunPlan, process_index: int = 0, process_count: int = 1) -> None:
        if plan.micro_rows % process_count:
            raise UserError(
                f"training.micro_batch_size × data×fsdp shards = {plan.micro_rows} rows cannot be shared "
                f"by {process_count} hosts"
            )
        self._store = store
        self._plan = plan
        self._local_rows = plan.micro_rows // process_count
        self._first_row = process_index * self._local_rows
        self._lengths = store.lengths
        self._values = _values_of_documents(store)
        self._lock = threading.Lock()
        self._packed: OrderedDict[int, PackPlan] = OrderedDict()

    def __len__(self) -> int:
        return self._plan.total_steps

    def __repr__(self) -> str:
        return f"StepSource({len(self)} steps)"

    def __getitem__(self, step: int) -> Batch:
        """This host's slice of a step's batch: [accumulation, micro_rows / process_count, max_length]."""
        plan = self._plan
        shape = (plan.accumulation, self._local_rows, plan.max_length)
        batch: Batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
        batch["loss_mask"] = np.zeros(shape, np.bool_)
        for name, values in self._values.items():
            batch[name] = np.zeros(shape, values.dtype)
        for number, examples in enumerate(self.rows(step)):
            micro_batch, row = divmod(number, plan.micro_rows)
            row -= self._first_row
            if 0 <= row < self._local_rows:
                self._fill_row({name: array[micro_batch, row] for name, array in batch.items()}, examples)
        return batch

    def rows(self, step: int) -> list[NDArray[np.int64]]:
        """The examples (indices into the store) of each row of a step, without empty rows."""
        epoch, step_in_epoch = self._plan.locate(step)
        packed = self._epoch(epoch)
        first = step_in_epoch * self._plan.rows_per_step
        return [packed.row(row) for row in range(first, min(first + self._plan.rows_per_step, packed.rows))]

    def labelled(self, step: int, label_of_example: NDArray[np.integer[Any]]) -> Batch:
        """The batch of a step with an additional leaf `labels`: int32, the label of each token's example, -1 on
        padding."""
        batch = self[step]
        labels = np.full(batch["segment_ids"].shape, -1, np.int32)
        for number, examples in enumerate(self.rows(step)):
            micro_batch, row = divmod(number, self._plan.micro_rows)
            row -= self._first_row
            if 0 <= row < self._local_rows:
                of_segment = np.concatenate([[-1], np.repeat(label_of_example[examples], self._store.documents)])
                labels[micro_batch, row] = of_segment[batch["segment_ids"][micro_batch, row]]
        return {**batch, "labels": labels}

    def info(self, step: int) -> StepInfo:
        """The counts and the examples of a step."""
        rows = self.rows(step)
        examples = np.concatenate(rows)
        tokens = int(self._lengths[examples].sum())
        return StepInfo(
            epoch=self._plan.locate(step)[0],
            example_indices=examples,
            examples=len(examples),
            rows=len(rows),
            tokens=tokens,
            supervised_tokens=int(self._store.supervised[examples].sum()),
            fill=tokens / (len(rows) * self._plan.max_length),
        )

    def _fill_row(self, row: dict[str, NDArray[Any]], examples: Sequence[int] | NDArray[np.int64]) -> None:
        start, segment = 0, 0
        for example in examples:
            for document, span in enumerate(self._store.spans(example)):
                tokens = self._store.tokens[span]
                end, segment = start + len(tokens), segment + 1
                row["tokens"][start:end] = tokens
                row["targets"][start : end - 1] = tokens[1:]
                row["loss_mask"][start : end - 1] = self._store.loss_mask[span][1:]
                row["segment_ids"][start:end] = segment
                row["positions"][start:end] = np.arange(end - start)
                for name, values in self._values.items():
                    row[name][start:end] = values[example, document]
                start = end

    def _epoch(self, epoch: int) -> PackPlan:
        """The plan of an epoch; two are kept, because prefetching threads cross from one epoch into the next."""
        with self._lock:
            if epoch not in self._packed:
                plan = self._plan
                examples = epoch_examples(self._store.source_index, plan.weights, plan.seed, epoch)
                packed = pack(self._lengths[examples], plan.max_length, plan.packing, plan.seed, epoch)
                self._packed[epoch] = PackPlan(packed.row_offsets, examples[packed.examples])
                while len(self._packed) > 2:
                    self._packed.popitem(last=False)
            return self._packed[epoch]


def _values_of_documents(store: TokenStore) -> dict[str, NDArray[Any]]:
    """The further leaves of a batch, by name: [examples, documents], the value of each document."""
    good = None if store.good is None else np.broadcast_to(store.good[:, None], (len(store), store.documents))
    found = {"good": good, "reference": store.reference}
    return {name: values for name, values in found.items() if values is not None}


class BatchStream(Iterator[Batch]):
    """Batches from `start_step` to the end of the run, made ahead of time by threads; `close()` ends the threads.

    Resuming needs no saved position: a batch is a function of its step, on any number of hosts.
    """

    def __init__(self, source: StepSource, start_step: int, threads: int, ahead: int) -> None:
        import grain  # it imports Orbax; commands that only count steps do not need either

        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        self._iterator = iter(grain.MapDataset.source(source)[start_step:].to_iter_dataset(options))

    def __next__(self) -> Batch:
        batch: Batch = next(self._iterator)
        return batch

    def close(self) -> None:
        self._iterator.close()
