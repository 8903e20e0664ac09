"""From finished steps to records: counts, rates, learning rate; every n-th step to the trackers and the screen."""

import dataclasses
from collections.abc import Callable

import jax
import optax

from flacuna_jax.data.pipeline import StepInfo
from flacuna_jax.training.loop import StepRecord
from flacuna_jax.training.metrics import Throughput, Tracker, TrainRecord, peak_memory_bytes
from flacuna_jax.training.progress import Progress


class StepLog:
    """The loop's observer.

    Args:
      total_steps: where the run ends; the last step is always logged, and the first.
      every_steps: distance of the others.
      schedule: learning rate of each update, counted from 0.
      info: what a step (counted from 0) held.
      tracker, progress: where records go.
      throughput: rates; compilation is in none.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        every_steps: int,
        schedule: optax.Schedule,
        info: Callable[[int], StepInfo],
        tracker: Tracker,
        progress: Progress,
        throughput: Throughput,
    ) -> None:
        self._total_steps, self._every_steps = total_steps, every_steps
        self._schedule = jax.jit(schedule)
        self._info = info
        self._tracker, self._progress, self._throughput = tracker, progress, throughput
        self._compiled = False
        self.last_loss: float | None = None

    def __call__(self, result: StepRecord) -> None:
        info = self._info(result.step - 1)
        self.last_loss = result.loss
        self._progress.advance(result.step)
        self._throughput.add(info.tokens, info.supervised_tokens)
        if result.step % self._every_steps == 0 or result.step in (1, self._total_steps):
            record = self._record(result, info)
            self._tracker.log(record.to_json())
            self._progress.show(record)
        if not self._compiled:
            self._throughput.start()
            self._compiled = True

    def _record(self, result: StepRecord, info: StepInfo) -> TrainRecord:
        return TrainRecord(
            step=result.step,
            epoch=info.epoch,
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rate=float(self._schedule(result.step - 1)),
            examples=info.examples,
            rows=info.rows,
            tokens=info.tokens,
            supervised_tokens=info.supervised_tokens,
            fill=info.fill,
            **dataclasses.asdict(self._throughput.lap()),
            peak_memory_bytes=peak_memory_bytes(),
        )
