"""The hooks of a run: metrics, checkpoints, evaluations, and the report during training."""

import dataclasses

from flacuna_jax.config.run import EvaluationConfig
from flacuna_jax.logs.live_report import LiveReport
from flacuna_jax.logs.metrics import Tracker
from flacuna_jax.logs.report import environment, mixture_rows, read_metrics, write_report
from flacuna_jax.logs.step_log import StepLog
from flacuna_jax.run.bad_steps import BadStepPolicy
from flacuna_jax.run.measurement import Measurement
from flacuna_jax.run.setup import Setup, plan_facts
from flacuna_jax.say import Say
from flacuna_jax.storage.checkpoint import Checkpointer, Meta
from flacuna_jax.storage.run_directory import RunDirectory
from flacuna_jax.training.history import History, RecentLosses
from flacuna_jax.training.loop import Request, StateHook, StepHook, StepRecord
from flacuna_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Watch:
    """The hooks of every run. Their time does not count as training."""

    setup: Setup
    directory: RunDirectory
    checkpointer: Checkpointer
    tracker: Tracker
    history: History
    recent: RecentLosses
    log: StepLog
    measurement: Measurement | None
    on_bad: BadStepPolicy
    profile: StateHook | None
    report: LiveReport
    meta: Meta
    """Facts about the run that every checkpoint contains."""

    @property
    def hooks(self) -> tuple[StepHook | StateHook, ...]:
        settings, saving = self.setup.config.evaluation, self.setup.config.checkpoint
        evaluate = StateHook(every=settings.every_steps if settings else None, call=self.evaluate)
        save = StateHook(every=saving.every_steps, call=self.save, saves=True)
        observe, on_bad = StepHook(every=1, call=self.observe), StepHook(every=1, call=self.on_bad)
        return (observe, on_bad, evaluate, *([self.profile] if self.profile else []), save)

    def observe(self, record: StepRecord, state: TrainState) -> None:
        del state
        self.log(record)
        with self.log.throughput.paused():
            self.report.refresh()

    def save(self, state: TrainState) -> None:
        self.tracker.sync()
        counters = {"history": self.history.to_json(), "recent_losses": self.recent.values}
        meta = {**self.meta, "counters": counters}
        best = self.history.best(self.setup.config.checkpoint.keep_best)
        with self.log.aside("saving"):
            self.directory.publish()
            self.checkpointer.save(state.step, state.trainable, state.opt_state, meta, best)
            self.report.refresh()

    def evaluate(self, state: TrainState) -> Request:
        if self.measurement is None:
            return Request()
        with self.log.aside("evaluating"):
            request = self.measurement(state)
            self.report.refresh()
        return request


def warn_if_worse(directory: RunDirectory, settings: EvaluationConfig | None, history: History, say: Say) -> None:
    """Warns if no evaluation was as good as the one before the first step."""
    if settings is None or not history.values:
        return
    evaluations = (record for record in read_metrics(directory.metrics) if record.get("kind") == "evaluation")
    before = next((record.get(settings.metric) for record in evaluations if record["step"] == 0), None)
    best = history.values[history.best(1)[0]]
    if before is not None and not (best <= before if settings.lower_is_better else best >= before):
        say(
            f"warning    {settings.metric} was {before:.4g} before the first step and is {best:.4g} at its best; "
            "try a lower training.learning_rate first"
        )


def report_on(setup: Setup, directory: RunDirectory, status: str) -> None:
    """Writes report.html from the files of the run directory. Raises UserError if it cannot be written."""
    facts: dict[str, str] = {}
    for label, text in plan_facts(setup):
        facts[label] = f"{facts[label]}; {text}" if label in facts else text  # there may be several warnings
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
