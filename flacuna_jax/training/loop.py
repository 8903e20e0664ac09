"""The training loop: feeds batches to the step and calls hooks, without waiting for the device in between."""

import dataclasses
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Literal

import jax
import numpy as np
from jax.sharding import NamedSharding

from flacuna_jax.errors import UserError
from flacuna_jax.model.parameters import Params
from flacuna_jax.training.state import TrainState
from flacuna_jax.training.step import Step, StepMetrics

STEPS_IN_FLIGHT = 1
"""Number of later steps that are started before the results of a step are read. Small, so that the device always has
work, but a run can stop soon."""


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """Results of one step on the host. `step` counts batches; the first is 1."""

    step: int
    loss: float
    grad_norm: float
    skipped: int = 0
    """Number of bad steps so far, including this one if `in_a_row` is not 0."""
    in_a_row: int = 0
    """Number of consecutive bad steps up to this one; 0 if this step is good."""
    scalars: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Scalars of the objective by name."""

    @property
    def is_bad(self) -> bool:
        """Whether this step was skipped, see training/guard.py."""
        return self.in_a_row > 0

    @property
    def updates_before(self) -> int:
        """Number of updates before this step; the position in the learning rate schedule."""
        return self.step - 1 - (self.skipped - self.is_bad)


@dataclasses.dataclass(frozen=True)
class Request:
    """What a `StateHook` requests from the loop."""

    save: bool = False
    """Call the hooks that save, whether or not they are due."""
    finish: bool = False
    """End the run here: it has stopped improving."""


@dataclasses.dataclass(frozen=True)
class Hook:
    """When a hook is called: after every `every`-th step and the last one, and after the steps in `at`."""

    every: int | None = None
    at: Collection[int] = ()

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise UserError(f"every is {self.every}; a hook is called after every 1 or more steps")

    def is_due(self, step: int, total_steps: int) -> bool:
        return step in self.at or (self.every is not None and (step % self.every == 0 or step == total_steps))


@dataclasses.dataclass(frozen=True)
class StepHook(Hook):
    """Called with the results of each step, in order, once they are on the host.

    Up to `STEPS_IN_FLIGHT` later steps have been started by then, so the state argument is the newest state, not the
    state after this step. A hook ends the run by raising an exception.
    """

    call: Callable[[StepRecord, TrainState], None] = dataclasses.field(kw_only=True)


@dataclasses.dataclass(frozen=True)
class StateHook(Hook):
    """Called between two steps with the current state, while no step is running."""

    call: Callable[[TrainState], Request | None] = dataclasses.field(kw_only=True)
    saves: bool = False
    """Whether the hook saves the state. Such hooks are called after the other hooks of a step, also if one of those
    requests it, and when the run stops."""


End = Literal["finished", "enough", "stopped", "paused"]
"""Why a loop ended: all steps are done; a hook requested the end; `stop` returned True; step `until` is reached."""


@dataclasses.dataclass(frozen=True)
class Loop:
    """Everything that the loop needs besides the state.

    Args:
      step: from `make_step`.
      frozen: parameters that do not change.
      batches: this host's numpy batches, from the state's step on.
      batch_sharding: sharding of the global batch [accumulation, batch, length].
      total_steps: length of the run.
      hooks: called in this order, hooks that save after the others.
      stop: called at the start and after every step; True ends the run after saving it. Must agree on all hosts.
    """

    step: Step
    frozen: Params
    batches: Iterator[dict[str, np.ndarray]]
    batch_sharding: NamedSharding
    total_steps: int
    hooks: Sequence[StepHook | StateHook]
    stop: Callable[[], bool]

    def run(self, state: TrainState, until: int | None = None) -> tuple[TrainState, End]:
        """Trains from `state` to step `until`, or to the end.

        Returns:
          The last state, and why the loop ended. Unless that is "paused", hooks that save were called with this state.
        """
        in_flight: deque[tuple[int, StepMetrics]] = deque()

        def wait_until(left: int) -> None:
            while len(in_flight) > left:
                record = _finished(*in_flight.popleft())
                for hook in self.hooks:
                    if isinstance(hook, StepHook) and hook.is_due(record.step, self.total_steps):
                        hook.call(record, state)

        first = state.step
        last = self.total_steps if until is None else min(until, self.total_steps)
        end: End = "stopped" if self.stop() else "finished"
        while state.step < last and end == "finished":
            batch = to_devices(next(self.batches), self.batch_sharding)
            due = [hook for hook in self._state_hooks if hook.is_due(state.step + 1, self.total_steps)]
            # The device is idle before and after the first step, which compiles, and around state hooks, so that hooks
            # measure the times of steps only.
            alone = bool(due) or state.step == first
            wait_until(0 if alone else STEPS_IN_FLIGHT)
            trainable, opt_state, metrics = self.step(
                state.trainable, state.opt_state, self.frozen, batch, np.int32(state.step)
            )
            state = TrainState(state.step + 1, trainable, opt_state)
            in_flight.append((state.step, metrics))
            wait_until(0 if alone else STEPS_IN_FLIGHT)
            saving = any(hook.saves for hook in due)
            if self.stop():
                end = "stopped"
            else:
                requests = [hook.call(state) or Request() for hook in due if not hook.saves]
                saving |= any(request.save for request in requests)
                if any(request.finish for request in requests):
                    end = "enough"
                elif requests and self.stop():
                    end = "stopped"
            if saving or end != "finished":
                wait_until(0)
                for hook in self._state_hooks:
                    if hook.saves:
                        hook.call(state)
        wait_until(0)
        return state, "paused" if end == "finished" and state.step < self.total_steps else end

    @property
    def _state_hooks(self) -> list[StateHook]:
        return [hook for hook in self.hooks if isinstance(hook, StateHook)]


def to_devices(batch: dict[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Assembles the global batch from each host's part."""
    return {name: jax.make_array_from_process_local_data(sharding, leaf) for name, leaf in batch.items()}


def _finished(step: int, metrics: StepMetrics) -> StepRecord:
    found = jax.device_get(metrics)
    scalars = {name: float(value) for name, value in found.scalars.items()}
    return StepRecord(step, float(found.loss), float(found.grad_norm), int(found.skipped), int(found.in_a_row), scalars)
