"""`python -m flacuna_jax.train --config C [--a.b=value ...]`: the main job, from a checkpoint and data to an adapter.

Reads top to bottom: model, data, plan, starting state, loop, export. Every part lives in its room; this file only puts
them together.
"""

import datetime
import functools
import json
import sys
import time
from collections.abc import Sequence

import jax

from flacuna_jax import distributed
from flacuna_jax.arguments import Parser
from flacuna_jax.cli import EXIT_FAILURE, EXIT_OK, EXIT_STOPPED, leave, run_verb
from flacuna_jax.config.files import load_config, require_settings
from flacuna_jax.config.schema import RunConfig
from flacuna_jax.config.settings import ShowSettings
from flacuna_jax.data.pipeline import BatchStream, StepSource
from flacuna_jax.errors import UserError
from flacuna_jax.evaluation.suite import Evaluator
from flacuna_jax.huggingface.verify import VerificationError
from flacuna_jax.logs.live_report import LiveReport
from flacuna_jax.logs.metrics import open_tracker
from flacuna_jax.logs.progress import open_progress
from flacuna_jax.logs.steady_output import steady_output
from flacuna_jax.logs.step_log import StepLog
from flacuna_jax.model.sharding import batch_sharding
from flacuna_jax.run.bad_steps import BadStep, BadStepPolicy, BatchInspector
from flacuna_jax.run.deliver import deliver_result, what_next
from flacuna_jax.run.determinism import Beginning, NotDeterministic, check_determinism
from flacuna_jax.run.evaluation import make_measurement, read_tasks
from flacuna_jax.run.resume import WORDS
from flacuna_jax.run.setup import (
    Say,
    Setup,
    open_parts,
    peak_flops,
    plan_lines,
    require_output_apart,
    say_at_once,
    say_nothing,
    say_on_stderr,
    set_up,
)
from flacuna_jax.run.start import chosen_state, fresh_state, newest_state, starting_point
from flacuna_jax.run.stop import Stopped, StopRequest
from flacuna_jax.run.watch import Watch, measurement_is_due, report_on, say_if_worse, say_what_is_cut
from flacuna_jax.storage.bucket import is_bucket, open_output, require_supported
from flacuna_jax.storage.checkpoint import Checkpointer
from flacuna_jax.storage.run_directory import RunDirectory
from flacuna_jax.training.flops import StepFlops, flops_of_step
from flacuna_jax.training.loop import Loop
from flacuna_jax.training.profile import PROFILE, traced
from flacuna_jax.training.step import StepConfig, make_step


def main(argv: Sequence[str] | None = None) -> int | None:
    parser = Parser(
        "train",
        "Fine-tunes a LLaMA: LoRA adapters, or every weight with lora: null.",
        epilog="Any setting of the config can be overridden: --training.epochs=2 --data.sources.0.path=my.jsonl. "
        f"Exit status: 0 done; 2 the input is wrong; {EXIT_STOPPED} a signal ended the run (SIGTERM, SIGINT, "
        "SIGHUP, SIGUSR1, SIGUSR2), its state is saved, the same command continues it; 1 anything else.",
    )
    parser.add_argument("--config", required=True, metavar="YAML", help="see configs/")
    parser.add_argument("--settings", action=ShowSettings, help="print every setting, what it does and its default")
    parser.add_argument("--profile", action="store_true", help="trace a few steps into output_dir/profile")
    parser.add_argument(
        "--check_determinism", action="store_true", help="only prove, on 3 steps, that a seed gives the same bytes"
    )
    parser.add_argument(
        "--inspect_step", type=int, metavar="N", help="only tell, as JSON, which examples step N holds and their losses"
    )
    arguments, overrides = parser.parse_with_overrides(argv)
    config = load_config(arguments.config, overrides)
    require_supported(config.output_dir)
    with StopRequest() as stop, steady_output():
        try:
            if arguments.check_determinism:
                return prove_determinism(config)
            if arguments.inspect_step is not None:
                return inspect_step(config, arguments.inspect_step)
            return train(config, stop, profile=arguments.profile)
        except Stopped as reason:
            print(f"stopped: {reason}", file=sys.stderr)
            return EXIT_STOPPED
        except (BadStep, NotDeterministic, VerificationError) as reason:
            print(f"error: {reason}", file=sys.stderr)
            return EXIT_FAILURE


def train(config: RunConfig, stop: StopRequest, *, profile: bool = False) -> int:
    """Runs, or resumes, one training run; returns the exit status.

    Raises:
      UserError: before anything is written if the input is wrong; later, if the output directory fails.
      Stopped: a signal came; what there was to save is saved.
      BadStep: the loss is not finite, or leapt, and the settings say to stop.
    """
    require_settings(config.checkpoint.allow_changes, tuple(WORDS), "checkpoint.allow_changes")
    distributed.initialize(config.distributed)
    require_output_apart(config)
    tasks = read_tasks(config)
    model = open_parts(config)
    primary = jax.process_index() == 0
    say: Say = say_at_once if primary else say_nothing
    if unread := distributed.unread_launcher():
        say(f"warning    {unread}")
    with open_output(config.output_dir, resume=config.checkpoint.resume, primary=primary, say=say) as directory:
        setup = set_up(model, say)
        # Adapters are small, and on a disk at once.
        asynchronous = config.lora is None or is_bucket(config.output_dir)
        with Checkpointer(directory.output, keep=config.checkpoint.keep, asynchronous=asynchronous) as checkpointer:
            run(setup, directory, checkpointer, stop, tasks, say, profile)
    return EXIT_OK


def run(
    setup: Setup,
    directory: RunDirectory,
    checkpointer: Checkpointer,
    stop: StopRequest,
    tasks: Evaluator | None,
    say: Say,
    profile: bool,
) -> None:
    """From the starting state to the delivered result."""
    config, plan = setup.config, setup.plan
    primary = jax.process_index() == 0
    for line in plan_lines(setup):
        say(line)
    start = starting_point(setup, directory, checkpointer, say)
    state, base, history = start.state, start.base, start.history
    if primary:
        directory.write_config(config.to_yaml())
        cut = directory.cut_back(state.step, measurement_is_due(setup, history, state.step))
        say_what_is_cut(cut, state.step, say)

    report = LiveReport(functools.partial(report_on, setup, directory) if primary else say_nothing, say)
    source = StepSource(setup.store, plan, jax.process_index(), jax.process_count())
    stream = BatchStream(source, start_step=state.step, threads=2, ahead=4)
    step_config = StepConfig.of_run(setup.spec, config)
    step = make_step(step_config, setup.layout.optimizer, setup.mesh, setup.layout.shardings)
    rows = batch_sharding(setup.mesh)
    started, first = time.monotonic(), state.step
    with (
        stop.deferred(),
        open_tracker(
            config.logging, directory.path, config=setup.meta["config"], after_step=state.step, primary=primary
        ) as tracker,
        open_progress(plan.total_steps, state.step, primary=primary) as progress,
    ):
        measurement = make_measurement(
            setup, step_config, base, history, tasks, tracker, directory, progress.say, stop.poll
        )
        log = StepLog(
            total_steps=plan.total_steps,
            every_steps=config.logging.every_steps,
            schedule=setup.schedule,
            info=source.info,
            tracker=tracker,
            progress=progress,
            flops=functools.partial(flops_of_step, StepFlops.of(setup.spec), setup.store.lengths),
            peak_flops=peak_flops(),
        )
        watch = Watch(setup, directory, checkpointer, stream, tracker, history, log, measurement, report, start.meta)
        splits = [one.split for one in config.data.sources]
        inspector = BatchInspector(setup.store, splits, source, step_config, rows, setup.tokenizer)
        loop = Loop(
            step=traced(step, directory.path / PROFILE, progress.say) if profile else step,
            frozen=base,
            batches=stream,
            batch_sharding=rows,
            total_steps=plan.total_steps,
            observe=watch.observe,
            on_bad=BadStepPolicy(config.training, inspector, base, directory.path if primary else None, progress.say),
            save=watch.save,
            save_every=config.checkpoint.every_steps,
            evaluate=watch.evaluate,
            evaluate_every=config.evaluation.every_steps if config.evaluation else None,
            stop=stop.poll,
        )
        try:
            watch.evaluate_if_due(state)
            state, end = (state, "enough") if watch.has_enough else loop.run(state)
        except BadStep as reason:
            report.finish(f"ended at a bad step: {str(reason).partition(';')[0]}")
            raise
        stream.close()
        checkpointer.wait()

    if end == "stopped" or stop.poll():
        report.finish(f"stopped by {stop.received or 'another host'} after step {state.step}")
        kept = f"saved after step {state.step}; start again to continue" if state.step else "no step was done"
        raise Stopped(f"{stop.received or 'another host'}: {kept}")
    taken = datetime.timedelta(seconds=round(time.monotonic() - started))
    now = f", {state.step - first:,} of them now," if first else ""
    say(f"{state.step:,} of {plan.total_steps:,} steps done{now} in {taken}")
    if end == "enough":
        say(f"stopped early: no new best in {history.since_best} evaluations")
    say_if_worse(directory, config.evaluation, history, say)
    course = "finished" if end == "finished" else f"finished early, after step {state.step:,}"
    chosen = chosen_state(setup, checkpointer, history, state, say)
    if chosen.step != state.step:
        course += f", the best of step {chosen.step:,} delivered"
    say(deliver_result(setup, directory, chosen, base, log.last_loss))
    report.finish(course)
    for line in what_next(config):
        say(line)


def prove_determinism(config: RunConfig) -> int:
    """Begins the run twice and compares bytes; writes nothing. Raises NotDeterministic; UserError for wrong input."""
    distributed.initialize(config.distributed)
    say: Say = say_at_once if jax.process_index() == 0 else say_nothing
    setup = set_up(open_parts(config), say)

    def begin() -> Beginning:
        step_config = StepConfig.of_run(setup.spec, setup.config)
        source = StepSource(setup.store, setup.plan, jax.process_index(), jax.process_count())
        state, base = fresh_state(setup)
        step = make_step(step_config, setup.layout.optimizer, setup.mesh, setup.layout.shardings)
        return Beginning(state, base, step, BatchStream(source, start_step=0, threads=2, ahead=2))

    check_determinism(begin, batch_sharding(setup.mesh), setup.plan.total_steps, say)
    return EXIT_OK


def inspect_step(config: RunConfig, number: int) -> int:
    """Prints the examples of a step and the loss of each with the newest checkpoint's parameters, or the first ones.

    Writes nothing, and may be asked beside a run. Raises UserError for wrong input, or a step that the run has not.
    """
    distributed.initialize(config.distributed)
    primary = jax.process_index() == 0
    setup = set_up(open_parts(config), say_on_stderr if primary else say_nothing)
    if not 1 <= number <= setup.plan.total_steps:
        raise UserError(f"--inspect_step {number}: the run's steps are 1 to {setup.plan.total_steps}")
    state, base = newest_state(setup, say_on_stderr if primary else say_nothing)
    source = StepSource(setup.store, setup.plan, jax.process_index(), jax.process_count())
    step_config = StepConfig.of_run(setup.spec, setup.config)
    splits = [one.split for one in config.data.sources]
    rows = batch_sharding(setup.mesh)
    inspector = BatchInspector(setup.store, splits, source, step_config, rows, setup.tokenizer)
    losses = inspector.losses(number, state.trainable, base)
    if primary:
        found = {"step": number, "losses_are_of_the_parameters_after_step": state.step}
        print(json.dumps({**found, "rows": inspector.describe(number, losses)}, ensure_ascii=False, indent=1))
    return EXIT_OK


if __name__ == "__main__":
    leave(run_verb(main))
