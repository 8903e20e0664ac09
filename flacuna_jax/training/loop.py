"""The loop around the step: batches in, metrics and checkpoints out, and never a wait for the device in between."""

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from flacuna_jax.model.parameters import Params
from flacuna_jax.training.state import TrainState
from flacuna_jax.training.step import Step, StepMetrics

STEPS_IN_FLIGHT = 2
"""Steps on the device before the loop waits for the oldest: enough to hide the host, few enough to stop soon."""


class LossNotFinite(RuntimeError):
    """The loss or its gradient became NaN or infinite; no checkpoint of it is written."""


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """Results of one step on the host. `step` counts completed updates, so the first is 1."""

    step: int
    loss: float
    grad_norm: float


Observer = Callable[[StepRecord], None]
"""Told of every finished step, in order, at most `STEPS_IN_FLIGHT` later than it was started."""


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
      save: called with the state after every `save_every` steps and after the last.
    """

    step: Step
    frozen: Params
    batches: Iterator[dict[str, np.ndarray]]
    batch_sharding: NamedSharding
    total_steps: int
    observe: Observer
    save: Callable[[TrainState], None]
    save_every: int

    def run(self, state: TrainState) -> TrainState:
        """Trains from `state` to the end and returns the last state.

        Raises:
          LossNotFinite: names the step; the checkpoints before it are intact.
        """
        in_flight: deque[tuple[int, StepMetrics]] = deque()

        def wait_until(left: int) -> None:
            while len(in_flight) > left:
                self.observe(_finished(*in_flight.popleft()))

        first = state.step
        while state.step < self.total_steps:
            batch = self._to_devices(next(self.batches))
            saving = (state.step + 1) % self.save_every == 0 or state.step + 1 == self.total_steps
            # Around the compiling step and around saves the device is idle, so that what an observer times is true.
            alone = saving or state.step == first
            wait_until(0 if alone else STEPS_IN_FLIGHT)
            trainable, opt_state, metrics = self.step(
                state.trainable, state.opt_state, self.frozen, batch, np.int32(state.step)
            )
            state = TrainState(state.step + 1, trainable, opt_state)
            in_flight.append((state.step, metrics))
            wait_until(0 if alone else STEPS_IN_FLIGHT)
            if saving:
                self.save(state)
        return state

    def _to_devices(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        def place(leaf: np.ndarray) -> jax.Array:
            return jax.make_array_from_process_local_data(self.batch_sharding, leaf)

        return {name: place(leaf) for name, leaf in batch.items()}


def _finished(step: int, metrics: Any) -> StepRecord:
    loss, grad_norm = (float(value) for value in jax.device_get(metrics))
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise LossNotFinite(f"step {step}: loss {loss}, gradient norm {grad_norm}; the run is stopped")
    return StepRecord(step, loss, grad_norm)
