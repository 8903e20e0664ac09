"""From finished steps to records: counts, rates, learning rate; every n-th step, and every bad one, to the trackers and
the screen."""

import contextlib
from collections.abc import Callable, Iterator

import jax
import optax

from flacuna_jax.data.pipeline import StepInfo
from flacuna_jax.logs.metrics import Throughput, Tracker, TrainRecord, peak_memory_bytes
from flacuna_jax.logs.progress import Progress
from flacuna_jax.training.loop import StepRecord


class StepLog:
    """The loop's observer.

    Args:
      total_steps: where the run ends; the last step is always logged, and the first.
      every_steps: distance of the others.
      schedule: learning rate of each update, counted from 0.
      info: what a step (counted from 0) held.
      tracker, progress: where records go.
      flops: FLOP of a step by what it held.
      peak_flops: FLOP/s of all devices together; None where the chip is not known.
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
    ) -> None:
        self._total_steps, self._every_steps = total_steps, every_steps
        self._schedule = jax.jit(schedule)
        self._info = info
        self._tracker, self._progress = tracker, progress
        self.throughput = Throughput()
        """Compilation is in no rate."""
        self._flops, self._peak_flops = flops, peak_flops
        self._compiled = False
        self.last_loss: float | None = None
        self.last_step: int | None = None

    def __call__(self, result: StepRecord) -> None:
        info = self._info(result.step - 1)
        self.last_loss, self.last_step = result.loss, result.step
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
        """Something besides steps, which is in no rate and is told to the person who watches."""
        with self.throughput.paused(), self._progress.doing(what):
            yield

    def _record(self, result: StepRecord, info: StepInfo) -> TrainRecord:
        rates = self.throughput.lap()
        mfu = None
        if rates.flops_per_second is not None and self._peak_flops is not None:
            mfu = rates.flops_per_second / self._peak_flops
        return TrainRecord(
            step=result.step,
            epoch=info.epoch,
            loss=result.loss,
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
