"""Turns finished steps into records of counts, rates and learning rate, and sends every n-th step and every bad step to
the trackers and the screen."""

import contextlib
from collections.abc import Callable, Iterator

import jax
import optax

from flacuna_jax.data.pipeline import StepInfo
from flacuna_jax.errors import UserError
from flacuna_jax.logs.metrics import Throughput, Tracker, TrainRecord, peak_memory_bytes
from flacuna_jax.logs.progress import Progress
from flacuna_jax.training.history import RecentLosses
from flacuna_jax.training.loop import StepRecord


class StepLog:
    """Logs the steps of a run; called with every finished step.

    Args:
      total_steps: number of steps of the run; the first and last steps are always logged.
      every_steps: interval of the other logged steps.
      schedule: learning rate of each update, counted from 0.
      info: (step, counted from 0) → counts of its examples, rows and tokens.
      tracker, progress: receive the records.
      flops: (counts of a step) → its FLOP.
      peak_flops: peak FLOP/s of all devices together; None if the chip is unknown.
      recent: the losses of the last steps, to which those of good steps are added.
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
        flops: Callable[[StepInfo], float],
        peak_flops: float | None,
        recent: RecentLosses,
    ) -> None:
        self._total_steps, self._every_steps = total_steps, every_steps
        self._schedule = jax.jit(schedule)
        self._info = info
        self._tracker, self._progress = tracker, progress
        self.throughput = Throughput()
        """Rates exclude compilation."""
        self._flops, self._peak_flops = flops, peak_flops
        self._recent = recent
        self._compiled = False
        self.last_step: int | None = None

    def __call__(self, result: StepRecord) -> None:
        info = self._info(result.step - 1)
        self.last_step = result.step
        if not result.is_bad:
            self._recent.add(result.loss)
        self._progress.advance(result.step)
        self.throughput.add(info.tokens, info.supervised_tokens, self._flops(info))
        if result.step % self._every_steps == 0 or result.step in (1, self._total_steps) or result.is_bad:
            record = self._record(result, info)
            self._tracker.log(record.to_json())
            self._progress.show(record)
        if not self._compiled:
            self.throughput.start()
            self._compiled = True

    @contextlib.contextmanager
    def aside(self, what: str) -> Iterator[None]:
        """While the block runs, shows an activity other than training, and excludes its time from the rates."""
        with self.throughput.paused(), self._progress.doing(what):
            yield

    def _record(self, result: StepRecord, info: StepInfo) -> TrainRecord:
        if taken := result.scalars.keys() & (TrainRecord.names() | {"kind"}):
            raise UserError(f"the objective has a scalar {min(taken)!r}, but every run logs that name; rename it")
        rates = self.throughput.lap()
        mfu = None
        if rates.flops_per_second is not None and self._peak_flops is not None:
            mfu = rates.flops_per_second / self._peak_flops
        return TrainRecord(
            step=result.step,
            epoch=info.epoch,
            loss=result.loss,
            mean_loss=self._recent.mean,
            grad_norm=result.grad_norm,
            learning_rate=float(self._schedule(result.updates_before)),
            examples=info.examples,
            rows=info.rows,
            tokens=info.tokens,
            supervised_tokens=info.supervised_tokens,
            fill=info.fill,
            tokens_per_second=rates.tokens_per_second,
            supervised_tokens_per_second=rates.supervised_tokens_per_second,
            seconds_per_step=rates.seconds_per_step,
            mfu=mfu,
            peak_memory_bytes=peak_memory_bytes(),
            skipped=result.skipped,
            scalars=result.scalars,
        )
