"""A training run as an object. `flacuna train` trains it to its end; a program can train in parts and add hooks."""

import contextlib
import dataclasses
import datetime
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from flacuna_jax import distributed
from flacuna_jax.config.files import require_config, require_settings
from flacuna_jax.config.run import RunConfig
from flacuna_jax.data.pipeline import BatchStream, StepSource
from flacuna_jax.errors import UserError
from flacuna_jax.evaluation.suite import Evaluator
from flacuna_jax.logs.live_report import LiveReport
from flacuna_jax.logs.metrics import open_tracker
from flacuna_jax.logs.progress import open_progress
from flacuna_jax.logs.step_log import StepLog
from flacuna_jax.model.parameters import Params
from flacuna_jax.model.sharding import batch_sharding
from flacuna_jax.run.bad_steps import BadStep, BadStepPolicy, BatchInspector
from flacuna_jax.run.deliver import deliver_result
from flacuna_jax.run.evaluation import make_measurement, read_tasks
from flacuna_jax.run.measurement import is_due
from flacuna_jax.run.reference import with_reference
from flacuna_jax.run.resume import WORDS
from flacuna_jax.run.setup import (
    Setup,
    open_parts,
    peak_flops,
    plan_facts,
    require_adapters,
    require_output_apart,
    set_up,
)
from flacuna_jax.run.start import chosen_state, starting_point
from flacuna_jax.run.stop import StopRequest
from flacuna_jax.run.watch import Watch, report_on, warn_if_worse
from flacuna_jax.say import Say, say_at_once, say_nothing
from flacuna_jax.storage.bucket import is_bucket, open_output
from flacuna_jax.storage.checkpoint import Checkpointer
from flacuna_jax.storage.run_directory import RunDirectory
from flacuna_jax.training.flops import StepFlops, flops_of_step
from flacuna_jax.training.loop import End, Loop, Request, StateHook, StepHook, StepRecord
from flacuna_jax.training.objective import Objective
from flacuna_jax.training.profile import PROFILE, profile_hook
from flacuna_jax.training.state import TrainState
from flacuna_jax.training.step import make_step


@contextlib.contextmanager
def open_run(
    config: RunConfig,
    *,
    objective: Objective | None = None,
    hooks: Sequence[StepHook | StateHook] = (),
    stop: StopRequest | None = None,
    say: Say = say_at_once,
    profile: bool = False,
) -> Iterator["TrainingRun"]:
    """Opens a run in `config.output_dir`: a new one, or an existing one at its newest checkpoint.

    All inputs are read and checked before anything is written. Only the first host prints.

    Args:
      config: from `load_config` or `parse_config`.
      objective: replaces the one that the settings ask for. A run must be resumed with the objective it began with.
      hooks: see `TrainingRun.add_hook`.
      stop: ends training between two steps; None: training cannot be stopped.
      say: receives the lines that `flacuna train` prints.
      profile: trace a few steps into output_dir/profile.

    Raises:
      UserError: the config, the model, the data or the output directory is not usable; the message says why.
    """
    require_config(config)
    require_settings(config.checkpoint.allow_changes, tuple(WORDS), "checkpoint.allow_changes")
    distributed.initialize(config.distributed)
    require_output_apart(config)
    tasks = read_tasks(config)
    parts = open_parts(config)
    primary = jax.process_index() == 0
    say = say if primary else say_nothing
    if unread := distributed.unread_launcher():
        say(f"warning    {unread}")
    with open_output(config.output_dir, resume=config.checkpoint.resume, primary=primary, say=say) as directory:
        setup = set_up(parts, say, objective)
        require_adapters(setup)
        # Adapters are small, so writing them asynchronously would not save time.
        asynchronous = config.lora is None or is_bucket(config.output_dir)
        with (
            Checkpointer(directory.output, keep=config.checkpoint.keep, asynchronous=asynchronous) as checkpointer,
            contextlib.ExitStack() as outputs,
        ):
            run = TrainingRun(setup, directory, checkpointer, tasks, stop or StopRequest(), say, profile, outputs)
            for hook in hooks:
                run.add_hook(hook)
            yield run


class TrainingRun:
    """One run from its start to its delivery; created by `open_run`.

    Attributes:
      setup: the resolved config, the data and the plan.
      state: the step, the trainable parameters and the optimizer state.
      base: the frozen parameters.
    """

    def __init__(
        self,
        setup: Setup,
        directory: RunDirectory,
        checkpointer: Checkpointer,
        tasks: Evaluator | None,
        stop: StopRequest,
        say: Say,
        profile: bool,
        outputs: contextlib.ExitStack,
    ) -> None:
        config, self._primary = setup.config, jax.process_index() == 0
        self._directory, self._checkpointer = directory, checkpointer
        self._stop, self._say, self._outputs = stop, say, outputs
        for label, text in plan_facts(setup):
            say(f"{label:<10} {text}")
        start = starting_point(setup, directory, checkpointer, say)
        self.setup = setup = with_reference(setup, start.base, start.state, say)
        self.state: TrainState = start.state
        self.base: Params = start.base
        self._history, self._recent = start.history, start.recent
        self._meta, self._first_step = start.meta, start.state.step
        if self._primary:
            directory.write_config(config.to_yaml())
            cut = directory.cut_back(self.step, self._evaluation_is_due)
            if cut.later:
                say(f"metrics.jsonl: removed records newer than the checkpoint, after step {self.step}: {cut.later:,}")
            if cut.torn:
                say(f"metrics.jsonl: removed unreadable lines: {cut.torn:,}")
        self._report = LiveReport(functools.partial(report_on, setup, directory) if self._primary else say_nothing, say)
        self._tasks, self._profile = tasks, profile
        self._source = StepSource(setup.store, setup.plan, jax.process_index(), jax.process_count())
        stream = BatchStream(self._source, start_step=self.step, threads=2, ahead=4)
        self._stream = outputs.enter_context(contextlib.closing(stream))
        self._step_config = setup.step_config
        self._compiled = make_step(self._step_config, setup.layout.optimizer, setup.mesh, setup.layout.shardings)
        self._added: list[StepHook | StateHook] = []
        self._end: End = "paused"
        self._interrupted = self._closed = False
        outputs.callback(self._close)
        self._began = time.monotonic()

    @property
    def step(self) -> int:
        """Number of steps done."""
        return self.state.step

    @property
    def total_steps(self) -> int:
        return self.setup.plan.total_steps

    @property
    def params(self) -> dict[str, jax.Array]:
        """All parameters by path."""
        return {**self.base, **self.state.trainable}

    def add_hook(self, hook: StepHook | StateHook) -> None:
        """Adds a hook that is called after the run's own hooks. Its time does not count as training."""
        if not isinstance(hook, StepHook | StateHook):
            raise UserError(f"{hook!r} is not a hook; add StepHook(every=1, call=...) or StateHook(every=1, call=...)")
        if isinstance(hook, StepHook):
            self._added.append(dataclasses.replace(hook, call=functools.partial(self._call_step_hook, hook)))
        else:
            self._added.append(dataclasses.replace(hook, call=functools.partial(self._call_state_hook, hook)))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        """Writes numbers to metrics.jsonl and the trackers; the report draws each as a curve.

        Args:
          step: at which they are drawn.
          numbers: by name, of Python or arrays without dimensions.

        Raises:
          UserError: a value is not a number, its name is "step" or "kind", or training has ended.
        """
        self._require_open()
        record = {"step": step, "kind": "hook"}
        if taken := record.keys() & numbers.keys():
            raise UserError(f"run.log cannot log a number named {min(taken)!r}, which every record has; rename it")
        self._watch.tracker.log(record | {name: _number(name, value) for name, value in numbers.items()})

    def train(self, until: int | None = None) -> End:
        """Trains to step `until`, or to the end of the run.

        Returns:
          Why it ended. Only after "paused" may `train` be called again; to continue a stopped run, open it again.

        Raises:
          BadStep: the loss or its gradient is not finite or a spike, and the settings end the run.
          UserError: the output directory cannot be written, the run is over, `until` is not a step that is left, or an
            earlier call raised an exception.
        """
        if self._interrupted:
            raise UserError(
                "an exception ended training, and the steps since the newest checkpoint are lost; open the run again "
                "to continue from there"
            )
        self._require_open()
        if until is not None and not (isinstance(until, int) and self.step <= until):
            raise UserError(f"until is {until!r}; it must be a whole number, and the run is at step {self.step}")
        self._interrupted = True
        with self._stop.deferred():
            watch = self._watch
            loop = Loop(
                step=self._compiled,
                frozen=self.base,
                batches=self._stream,
                batch_sharding=batch_sharding(self.setup.mesh),
                total_steps=self.total_steps,
                hooks=(*watch.hooks, *self._added),
                stop=self._stop.poll,
            )
            watch.log.throughput.resume()
            try:
                if self._evaluation_is_due:
                    watch.evaluate(self.state)
                if self._has_enough:
                    self._end = "enough"
                else:
                    self.state, self._end = loop.run(self.state, until)
            except BadStep as reason:
                self._report.finish(f"ended at a bad step: {str(reason).partition(';')[0]}")
                raise
            self._checkpointer.wait()
            watch.log.throughput.pause()
            if self._end != "paused":
                self._outputs.close()
        self._interrupted = False
        return self._end

    def save(self) -> None:
        """Writes a checkpoint of the current state, and waits until it is written."""
        self._watch.save(self.state)
        self._checkpointer.wait()

    def stopped(self, by: str) -> str:
        """Finishes the report of a run that was stopped, and returns a line with the saved step."""
        self._report.finish(f"stopped by {by} after step {self.step}")
        return f"{by}: " + (
            f"saved after step {self.step}; start again to continue" if self.step else "stopped before the first step"
        )

    def deliver(self) -> Path:
        """Writes and verifies the adapter, or the model after full fine-tuning, and finishes the report.

        Returns:
          The directory of the adapter or model.

        Raises:
          UserError: the run has not reached its end, or the files cannot be written.
        """
        config, history, say = self.setup.config, self._history, self._say
        if self._end not in ("finished", "enough"):
            raise UserError(
                f"the run is at step {self.step} of {self.total_steps}; train it to its end before you deliver it, "
                "or export a checkpoint"
            )
        taken = datetime.timedelta(seconds=round(time.monotonic() - self._began))
        now = f", {self.step - self._first_step:,} of them now," if self._first_step else ""
        say(f"{self.step:,} of {self.total_steps:,} steps done{now} in {taken}")
        if self._end == "enough":
            say(f"stopped early: no new best in {history.since_best} evaluations")
        warn_if_worse(self._directory, config.evaluation, history, say)
        chosen = chosen_state(self.setup, self._checkpointer, history, self.state, say)
        directory, line = deliver_result(self.setup, self._directory, chosen, self.base, self.step, self._recent.mean)
        say(line)
        course = "finished" if self._end == "finished" else f"finished early, after step {self.step:,}"
        if chosen.step != self.step:
            course += f", the best of step {chosen.step:,} delivered"
        self._report.finish(course)
        return directory

    def _require_open(self) -> None:
        if self._closed:
            raise UserError(
                "the run is over: its training has ended, or the `with open_run(...)` block has; open it again to go on"
            )

    def _close(self) -> None:
        self._closed = True

    def _call_step_hook(self, hook: StepHook, record: StepRecord, state: TrainState) -> None:
        with self._watch.log.throughput.paused():
            hook.call(record, state)

    def _call_state_hook(self, hook: StateHook, state: TrainState) -> Request | None:
        with self._watch.log.aside("calling a hook"):
            answer = hook.call(state)
        if not (answer is None or isinstance(answer, Request)):
            raise UserError(f"a StateHook returned {answer!r}; return None, or a Request to save or to finish")
        return answer

    @functools.cached_property
    def _watch(self) -> Watch:
        """Opened on first use; its outputs are closed at the end of training."""
        setup, config, primary = self.setup, self.setup.config, self._primary
        path = self._directory.path
        tracker = self._outputs.enter_context(
            open_tracker(config.logging, path, config=setup.meta["config"], after_step=self.step, primary=primary)
        )
        progress = self._outputs.enter_context(open_progress(self.total_steps, self.step, primary=primary))
        log = StepLog(
            total_steps=self.total_steps,
            every_steps=config.logging.every_steps,
            schedule=setup.schedule,
            info=self._source.info,
            tracker=tracker,
            progress=progress,
            flops=functools.partial(
                flops_of_step,
                StepFlops.of(setup.spec, self._step_config.objective.forwards),
                setup.store.document_lengths,
            ),
            peak_flops=peak_flops(),
            recent=self._recent,
        )
        measurement = make_measurement(
            setup, self._step_config, self.base, self._history, self._tasks, tracker, self._directory, progress.say,
            self._stop.poll,
        )  # fmt: skip
        splits = [one.split for one in config.data.sources]
        rows = batch_sharding(setup.mesh)
        inspector = BatchInspector(setup.store, splits, self._source, self._step_config, rows, setup.tokenizer)
        on_bad = BadStepPolicy(config.training, inspector, self.base, path if primary else None, progress.say)
        profile = profile_hook(path / PROFILE, self.step, self.total_steps, progress.say) if self._profile else None
        return Watch(
            setup, self._directory, self._checkpointer, tracker, self._history, self._recent, log, measurement, on_bad,
            profile, self._report, self._meta,
        )  # fmt: skip

    @property
    def _evaluation_is_due(self) -> bool:
        """Whether to evaluate before training: at step 0, or after a stop between a step and its evaluation."""
        settings = self.setup.config.evaluation
        return settings is not None and is_due(settings, self._history, self.step, self.total_steps)

    @property
    def _has_enough(self) -> bool:
        """Whether early stopping has already ended this run."""
        settings = self.setup.config.evaluation
        return settings is not None and self._history.is_exhausted(settings.patience)


def _number(name: str, value: object) -> float:
    if isinstance(value, int | float):
        return value
    if isinstance(value, np.generic | np.ndarray | jax.Array) and value.shape == ():
        return float(value)
    raise UserError(f"run.log: {name!r} is {value!r}, which is not a number")
