"""The loop around the step: batches in, metrics and checkpoints out, and never a wait for the device in between."""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import NamedSharding

from flacuna_jax.model.parameters import Params
from flacuna_jax.training.state import TrainState
from flacuna_jax.training.step import Step, StepMetrics

STEPS_IN_FLIGHT = 1
"""Steps behind the one at work when the loop waits: the next is always ready, and little is in the way of stopping."""


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """Results of one step on the host. `step` counts batches, so the first is 1."""

    step: int
    loss: float
    grad_norm: float
    skipped: int = 0
    """Bad steps so far; this one is among them if `in_a_row` is not 0."""
    in_a_row: int = 0

    @property
    def is_bad(self) -> bool:
        """Whether this step changed nothing, see training/guard.py."""
        return self.in_a_row > 0

    @property
    def updates_before(self) -> int:
        """Updates made when the step began: what the schedule counts."""
        return self.step - 1 - (self.skipped - self.is_bad)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What an evaluation asks of the loop."""

    save: bool = False
    enough: bool = False
    """The run has stopped getting better."""


Observer = Callable[[StepRecord], None]
"""Told of every finished step, in order, at most `STEPS_IN_FLIGHT` later than it was started."""

End = Literal["finished", "enough", "stopped"]


@dataclasses.dataclass(frozen=True)
class Loop:
    """Everything a run needs besides its state.

    Args:
      step: from `make_step`.
      frozen: parameters that do not change.
      batches: this host's numpy batches, beginning at the state's step.
      batch_sharding: of the global batch [accumulation, batch, length].
      total_steps: where the run ends.
      observe: receives every step's results.
      on_bad: called with a bad step's results and the state of now (one step on, at most); ends the run by raising.
      save: called with the state after every `save_every` steps, after the last, and when an evaluation asks for it.
      evaluate: called with the state after every `evaluate_every` steps and after the last.
      stop: asked at the start and after every step; True ends the run there, saved. The same on all hosts.
    """

    step: Step
    frozen: Params
    batches: Iterator[dict[str, np.ndarray]]
    batch_sharding: NamedSharding
    total_steps: int
    observe: Observer
    on_bad: Callable[[StepRecord, TrainState], None]
    save: Callable[[TrainState], None]
    save_every: int
    evaluate: Callable[[TrainState], Verdict]
    evaluate_every: int | None
    stop: Callable[[], bool]

    def run(self, state: TrainState) -> tuple[TrainState, End]:
        """Trains from `state`; returns the last state, which is saved, and why it is the last."""
        in_flight: deque[tuple[int, StepMetrics]] = deque()

        def wait_until(left: int) -> None:
            while len(in_flight) > left:
                record = _finished(*in_flight.popleft())
                self.observe(record)
                if record.is_bad:
                    self.on_bad(record, state)

        first = state.step
        end: End = "stopped" if self.stop() else "finished"
        while state.step < self.total_steps and end == "finished":
            batch = to_devices(next(self.batches), self.batch_sharding)
            evaluating = self._is_due(state.step + 1, self.evaluate_every)
            saving = self._is_due(state.step + 1, self.save_every)
            # Around the compiling step, evaluations and saves the device is idle, so that what an observer times is
            # true.
            alone = evaluating or saving or state.step == first
            wait_until(0 if alone else STEPS_IN_FLIGHT)
            trainable, opt_state, metrics = self.step(
                state.trainable, state.opt_state, self.frozen, batch, np.int32(state.step)
            )
            state = TrainState(state.step + 1, trainable, opt_state)
            in_flight.append((state.step, metrics))
            wait_until(0 if alone else STEPS_IN_FLIGHT)
            if self.stop():
                end = "stopped"
            elif evaluating:
                verdict = self.evaluate(state)
                saving |= verdict.save
                end = "enough" if verdict.enough else "stopped" if self.stop() else end
            if saving or end != "finished":
                wait_until(0)
                self.save(state)
        return state, end

    def _is_due(self, step: int, every: int | None) -> bool:
        return every is not None and (step % every == 0 or step == self.total_steps)


def to_devices(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """A global batch of what each host has of it."""
    return {name: jax.make_array_from_process_local_data(sharding, leaf) for name, leaf in batch.items()}


def _finished(step: int, metrics: Any) -> StepRecord:
    loss, grad_norm, skipped, in_a_row = jax.device_get(metrics)
    return StepRecord(step, float(loss), float(grad_norm), int(skipped), int(in_a_row))
