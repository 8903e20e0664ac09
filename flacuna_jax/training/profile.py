"""A trace of a few steps, for TensorBoard's profiler or Perfetto."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax

from flacuna_jax.training.loop import StateHook
from flacuna_jax.training.state import TrainState

PROFILE = "profile"
SKIPPED, TRACED = 2, 3
"""Number of steps before the trace (the first one compiles), and number of traced steps."""


def profile_hook(directory: Path, first_step: int, total_steps: int, say: Callable[[str], None]) -> StateHook:
    """Traces steps `first_step` + 3 to `first_step` + 5 into `directory`; the device is idle at both ends."""
    begin, end = first_step + SKIPPED, min(first_step + SKIPPED + TRACED, total_steps)
    return StateHook(at=(begin, end), call=_Profile(directory, begin, say))


@dataclasses.dataclass(frozen=True)
class _Profile:
    directory: Path
    begin: int
    say: Callable[[str], None]

    def __call__(self, state: TrainState) -> None:
        jax.block_until_ready(state.trainable)
        if state.step == self.begin:
            jax.profiler.start_trace(str(self.directory), create_perfetto_trace=True)
        else:
            jax.profiler.stop_trace()
            self.say(f"profile of {TRACED} steps: {self.directory} (tensorboard --logdir, or ui.perfetto.dev)")
