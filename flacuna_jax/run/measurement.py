"""One evaluation during training: held-out records, sample answers, benchmarks; decides whether to save or finish."""

import dataclasses
import difflib
import time
from collections.abc import Callable, Sequence
from typing import Any

from flacuna_jax.config.run import EvaluationConfig
from flacuna_jax.errors import UserError
from flacuna_jax.logs.metrics import Tracker
from flacuna_jax.model.parameters import Params
from flacuna_jax.run.samples import Sampler
from flacuna_jax.training.evaluator import HeldOut
from flacuna_jax.training.history import History
from flacuna_jax.training.loop import Request
from flacuna_jax.training.state import TrainState

Tasks = Callable[[Params], dict[str, float]]
"""Runs the benchmarks: (all parameters) → scores by name."""


def is_due(settings: EvaluationConfig, history: History, step: int, total_steps: int) -> bool:
    """Whether a run that starts after `step` updates must be evaluated first: before the first step, or if it was
    stopped between a step and its evaluation."""
    return step > history.last_step and (step % settings.every_steps == 0 or step == total_steps)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """A hook that the loop calls every `settings.every_steps` steps and after the last; also called before the first.

    Args:
      settings: the metric, the benchmarks, and the patience.
      keep_best: number of best checkpoints to keep.
      held_out: None if no records are held out.
      sampler: generates the sample answers.
      tasks: benchmarks.
      frozen: parameters that are not trained.
      history: earlier values of the metric.
      tracker, samples: receive the numbers, and the sample answers.
      say: receives messages for the user.
      stop: called between batches; an abandoned evaluation is repeated when the run continues.
    """

    settings: EvaluationConfig
    keep_best: int
    held_out: HeldOut | None
    sampler: Sampler
    tasks: Tasks | None
    frozen: Params
    history: History
    tracker: Tracker
    samples: Callable[[dict[str, Any]], None]
    say: Callable[[str], None]
    stop: Callable[[], bool]

    def __call__(self, state: TrainState) -> Request:
        """Raises UserError if `evaluation.metric` is not a measured number."""
        started = time.monotonic()
        record: dict[str, Any] = {}
        if self.held_out is not None:
            measured = self.held_out.measure(state.trainable, self.frozen, self.stop)
            if measured is None:
                return Request()
            record |= measured
        params = {**self.frozen, **state.trainable}
        if self.tasks is not None and self._tasks_are_due(state.step):
            record |= {f"tasks/{name}": value for name, value in self.tasks(params).items()}
        for line in self.sampler.records(state.step, params):
            self.samples(line)
        self.tracker.log({"step": state.step, "kind": "evaluation", **record})
        self.say(f"evaluation after step {state.step}: {_in_words(record)} ({time.monotonic() - started:.1f} s)")
        return self._judge(state.step, record)

    def _tasks_are_due(self, step: int) -> bool:
        tasks = self.settings.tasks
        return tasks is not None and (tasks.every_steps is None or step % tasks.every_steps == 0)

    def _judge(self, step: int, record: dict[str, Any]) -> Request:
        metric = self.settings.metric
        if metric not in record:
            if metric.startswith("tasks/") and not self._tasks_are_due(step):
                self.history.add(step, None)
                return Request()
            numbers = [name for name in record if name not in ("step", "kind")]
            near = difflib.get_close_matches(metric, numbers, n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"evaluation.metric {metric!r} is not a measured number{hint}")
        if step == 0:  # The model before training is never the best checkpoint.
            self.history.add(step, None)
            return Request()
        self.history.add(step, record[metric])
        return Request(
            save=step in self.history.best(self.keep_best), finish=self.history.is_exhausted(self.settings.patience)
        )


def _in_words(record: dict[str, Any]) -> str:
    shown = {
        "eval/loss": "held-out loss {:.4f}",
        "eval/perplexity": "perplexity {:.2f}",
        "eval/token_accuracy": "token accuracy {:.1%}",
        "eval/rewards/accuracy": "preferred {:.1%}",
        "eval/rewards/margin": "margin {:.3f}",
    }
    words = [text.format(record[name]) for name, text in shown.items() if name in record]
    return ", ".join([*words, *(f"{name.removeprefix('tasks/')} {value:.3f}" for name, value in _tasks(record))])


def _tasks(record: dict[str, Any]) -> Sequence[tuple[str, float]]:
    return [(name, value) for name, value in record.items() if name.startswith("tasks/")]
