"""A trace of a few steps, for TensorBoard's profiler or Perfetto."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from flacuna_jax.training.step import Step

PROFILE = "profile"
SKIPPED, TRACED = 2, 3
"""Steps before the trace begins (the first compiles), and steps in it."""


def traced(step: Step, directory: Path, say: Callable[[str], None]) -> Step:
    """The same step; calls 3 to 5 are traced into `directory`, the device idle at both ends."""
    calls = 0

    def on_call(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == SKIPPED + 1:
            jax.block_until_ready(arguments[0])
            jax.profiler.start_trace(str(directory), create_perfetto_trace=True)
        results = step(*arguments)
        if calls == SKIPPED + TRACED:
            jax.block_until_ready(results)
            jax.profiler.stop_trace()
            say(f"profile of {TRACED} steps: {directory} (tensorboard --logdir, or ui.perfetto.dev)")
        return results

    return on_call
