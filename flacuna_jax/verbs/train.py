"""Trains an adapter or a model from a checkpoint and data: one process of a run, until its end or a signal."""

import argparse
import json
import sys
from collections.abc import Sequence

import jax

from flacuna_jax import distributed
from flacuna_jax.cli import EXIT_FAILURE, EXIT_OK, EXIT_STOPPED
from flacuna_jax.config.run import RunConfig
from flacuna_jax.data.pipeline import BatchStream, StepSource
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.verify import VerificationError
from flacuna_jax.logs.steady_output import steady_output
from flacuna_jax.model.sharding import batch_sharding
from flacuna_jax.run.bad_steps import BadStep, BatchInspector
from flacuna_jax.run.deliver import what_next
from flacuna_jax.run.determinism import Beginning, NotDeterministic, check_determinism
from flacuna_jax.run.reference import with_reference
from flacuna_jax.run.setup import (
    open_parts,
    set_up,
)
from flacuna_jax.run.start import fresh_state, newest_state
from flacuna_jax.run.stop import Stopped, StopRequest
from flacuna_jax.run.training_run import open_run
from flacuna_jax.say import Say, say_at_once, say_nothing, say_on_stderr
from flacuna_jax.storage.bucket import require_supported
from flacuna_jax.training.loop import StateHook, StepHook
from flacuna_jax.training.step import make_step


def run(arguments: argparse.Namespace, config: RunConfig, hooks: Sequence[StepHook | StateHook]) -> int:
    """Returns the exit status."""
    require_supported(config.output_dir)
    with StopRequest() as stop, steady_output():
        try:
            if arguments.check_determinism:
                return prove_determinism(config)
            if arguments.inspect_step is not None:
                return inspect_step(config, arguments.inspect_step)
            return train(config, stop, profile=arguments.profile, hooks=hooks)
        except Stopped as reason:
            print(f"stopped: {reason}", file=sys.stderr)
            return EXIT_STOPPED
        except (BadStep, NotDeterministic, VerificationError) as reason:
            print(f"error: {reason}", file=sys.stderr)
            return EXIT_FAILURE


def train(
    config: RunConfig, stop: StopRequest, *, profile: bool = False, hooks: Sequence[StepHook | StateHook] = ()
) -> int:
    """Starts or resumes a training run, trains it to its end, and returns the exit status.

    Raises:
      UserError: the input is invalid, before anything is written; or later, the output directory cannot be written.
      Stopped: a signal arrived; the state is saved.
      BadStep: the loss or its gradient is not finite or a spike, and the settings end the run.
    """
    with open_run(config, stop=stop, profile=profile, hooks=hooks) as run:
        if run.train() == "stopped" or stop.poll():
            raise Stopped(run.stopped(by=stop.received or "another host"))
        run.deliver()
    if jax.process_index() == 0:
        for line in what_next(config):
            say_at_once(line)
    return EXIT_OK


def prove_determinism(config: RunConfig) -> int:
    """Starts the run twice and compares bytes; writes nothing. Raises NotDeterministic; UserError for invalid input."""
    distributed.initialize(config.distributed)
    say: Say = say_at_once if jax.process_index() == 0 else say_nothing
    setup = set_up(open_parts(config), say)

    def begin() -> Beginning:
        step_config = setup.step_config
        state, base = fresh_state(setup)
        store = with_reference(setup, base, state, say).store
        source = StepSource(store, setup.plan, jax.process_index(), jax.process_count())
        step = make_step(step_config, setup.layout.optimizer, setup.mesh, setup.layout.shardings)
        return Beginning(state, base, step, BatchStream(source, start_step=0, threads=2, ahead=2))

    check_determinism(begin, batch_sharding(setup.mesh), setup.plan.total_steps, say)
    return EXIT_OK


def inspect_step(config: RunConfig, number: int) -> int:
    """Prints the examples of a step, and the loss of each with the newest checkpoint's parameters, or the initial ones.

    Writes nothing, and may be called while the run is active. Raises UserError for invalid input or a nonexistent step.
    """
    distributed.initialize(config.distributed)
    primary = jax.process_index() == 0
    setup = set_up(open_parts(config), say_on_stderr if primary else say_nothing)
    if not 1 <= number <= setup.plan.total_steps:
        raise UserError(f"--inspect_step {number}: the run's steps are 1 to {setup.plan.total_steps}")
    state, base = newest_state(setup, say_on_stderr if primary else say_nothing)
    setup = with_reference(setup, base, state, say_on_stderr if primary else say_nothing)
    source = StepSource(setup.store, setup.plan, jax.process_index(), jax.process_count())
    step_config = setup.step_config
    splits = [one.split for one in config.data.sources]
    rows = batch_sharding(setup.mesh)
    inspector = BatchInspector(setup.store, splits, source, step_config, rows, setup.tokenizer)
    losses = inspector.losses(number, state.trainable, base)
    if primary:
        found = {"step": number, "losses_are_of_the_parameters_after_step": state.step}
        print(json.dumps({**found, "rows": inspector.describe(number, losses)}, ensure_ascii=False, indent=1))
    return EXIT_OK
