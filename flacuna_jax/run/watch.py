"""What happens around the steps of a run: records, saves, evaluations, and the report while it goes on."""

import dataclasses

from flacuna_jax.config.schema import EvaluationConfig
from flacuna_jax.data.pipeline import BatchStream
from flacuna_jax.logs.live_report import LiveReport
from flacuna_jax.logs.metrics import Tracker
from flacuna_jax.logs.report import environment, mixture_rows, read_metrics, write_report
from flacuna_jax.logs.step_log import StepLog
from flacuna_jax.run.measurement import Measurement, is_due
from flacuna_jax.run.setup import Say, Setup, plan_lines
from flacuna_jax.storage.checkpoint import Checkpointer, Meta
from flacuna_jax.storage.run_directory import CutBack, RunDirectory
from flacuna_jax.training.history import History
from flacuna_jax.training.loop import StepRecord, Verdict
from flacuna_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Watch:
    """The loop's callbacks. None of the time they take counts as training."""

    setup: Setup
    directory: RunDirectory
    checkpointer: Checkpointer
    stream: BatchStream
    tracker: Tracker
    history: History
    log: StepLog
    measurement: Measurement | None
    report: LiveReport
    meta: Meta
    """What every checkpoint says of the run."""

    def observe(self, record: StepRecord) -> None:
        self.log(record)
        with self.log.throughput.paused():
            self.report.refresh()

    def save(self, state: TrainState) -> None:
        self.tracker.sync()
        meta = {
            **self.meta,
            "cursor": self.stream.cursor(),
            "counters": {"history": self.history.to_json()},
        }
        best = self.history.best(self.setup.config.checkpoint.keep_best)
        with self.log.aside("saving"):
            self.directory.publish()
            self.checkpointer.save(state.step, state.trainable, state.opt_state, meta, best)
            self.report.refresh()

    def evaluate(self, state: TrainState) -> Verdict:
        if self.measurement is None:
            return Verdict()
        with self.log.aside("evaluating"):
            verdict = self.measurement(state)
            self.report.refresh()
        return verdict

    def evaluate_if_due(self, state: TrainState) -> None:
        """Before the first step; and where a run was stopped between a step and its evaluation."""
        if measurement_is_due(self.setup, self.history, state.step):
            self.evaluate(state)

    @property
    def has_enough(self) -> bool:
        """Whether a run that is started again had stopped early."""
        settings = self.setup.config.evaluation
        return settings is not None and self.history.is_exhausted(settings.patience)


def measurement_is_due(setup: Setup, history: History, step: int) -> bool:
    """Whether a run that begins after `step` updates is first measured."""
    settings = setup.config.evaluation
    return settings is not None and is_due(settings, history, step, setup.plan.total_steps)


def say_if_worse(directory: RunDirectory, settings: EvaluationConfig | None, history: History, say: Say) -> None:
    """At the end: that no evaluation was as good as the one before the first step."""
    if settings is None or not history.values:
        return
    at_first = (record for record in read_metrics(directory.metrics) if record.get("kind") == "evaluation")
    before = next((record.get(settings.metric) for record in at_first if record["step"] == 0), None)
    best = history.values[history.best(1)[0]]
    if before is not None and not (best <= before if settings.lower_is_better else best >= before):
        say(
            f"warning    {settings.metric} was {before:.4g} before the first step and is {best:.4g} at its best; "
            "a lower training.learning_rate is the first thing to try"
        )


def say_what_is_cut(cut: CutBack, step: int, say: Say) -> None:
    """Of metrics.jsonl, at a start after `step`: what is removed because it is made again, or cannot be read."""
    if cut.later:
        say(f"metrics.jsonl: records removed that no checkpoint knows, after step {step}: {cut.later:,}")
    if cut.torn:
        say(f"metrics.jsonl: unreadable lines removed: {cut.torn:,}")


def report_on(setup: Setup, directory: RunDirectory, status: str) -> None:
    """Writes report.html from what the run directory holds. Raises UserError if it cannot be written."""
    facts: dict[str, str] = {}
    for label, value in (line.split(maxsplit=1) for line in plan_lines(setup)):
        facts[label] = f"{facts[label]}; {value}" if label in facts else value  # there may be several warnings
    write_report(
        directory.report,
        title=directory.path.name,
        records=read_metrics(directory.metrics),
        facts=facts,
        mixture=mixture_rows(setup.report),
        config_yaml=setup.config.to_yaml(),
        environment=environment(),
        samples=read_metrics(directory.samples),
        status=status,
        total_steps=setup.plan.total_steps,
    )
