"""Finds benchmarks by name, and reads and checks them once, so that they can be run on any number of models.

`flacuna evaluate` makes tables of the results. A training run calls `task_evaluator` once, before its first step, and
then calls the evaluator on its current parameters.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from flacuna_jax.data.conversation import Template
from flacuna_jax.errors import UserError
from flacuna_jax.evaluation.benchmark import Benchmark, Options, Run
from flacuna_jax.evaluation.registry import BENCHMARKS, SUITES
from flacuna_jax.evaluation.results import TaskResult
from flacuna_jax.evaluation.sandbox import require_permission
from flacuna_jax.generation.chat_model import ChatModel
from flacuna_jax.generation.language_model import LanguageModel

Protocol = Literal["instructeval", "lm_eval"]
Evaluator = Callable[[LanguageModel], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """A benchmark as the user names it, with its number of worked examples (None if it has none)."""

    benchmark: Benchmark
    shots: int | None

    def __str__(self) -> str:
        return self.benchmark.name if self.shots is None else f"{self.benchmark.name}:{self.shots}"

    def load(self, data: Path, options: Options) -> Run:
        """Reads and checks the benchmark. Raises UserError for bad files, bad options or a missing permission."""
        if self.benchmark.executes_code:
            require_permission(self.benchmark.name, options.allow_code_execution)
        return self.benchmark.load(data, replace(options, shots=self.shots or 0))


def named_tasks(names: Sequence[str]) -> tuple[Task, ...]:
    """The tasks for names and suites (`mmlu`, `bbh:0`, `zero_shot`), in order and without duplicates.

    Raises:
      UserError: An unknown name, or a number of shots that is not a number.
    """
    benchmarks = {benchmark.name: benchmark for benchmark in BENCHMARKS}
    tasks: dict[Task, None] = {}
    for text in (part for name in names for part in SUITES.get(name.strip(), (name.strip(),))):
        name, colon, shots = text.partition(":")
        benchmark = benchmarks.get(name)
        if benchmark is None:
            known = ", ".join([*benchmarks, *SUITES])
            raise UserError(f"unknown benchmark {text!r}; choose from {known} (mmlu:0 means 0 shots)")
        if colon and benchmark.shots is None:
            raise UserError(f"benchmark {text!r}: {name} has no worked examples; write {name}")
        if colon and not shots.isdecimal():
            raise UserError(f"benchmark {text!r}: expected a number of shots after the colon, as in mmlu:5")
        tasks[Task(benchmark, int(shots) if colon else benchmark.shots)] = None
    return tuple(tasks)


def evaluate_model(
    model: ChatModel | LanguageModel,
    tasks: Sequence[str],
    data: str | os.PathLike[str],
    options: Options = Options(),  # noqa: B008
) -> list[TaskResult]:
    """Evaluates a model on benchmarks as InstructEval does. All of them are read and checked before the first one runs.

    Args:
      model: from `load_model`; its template is not used, because the benchmarks have their own prompts.
      tasks: benchmarks and suites: "mmlu", "bbh:0", "hhh", "zero_shot", ...
      data: directory of the benchmark files.
      options: limits, permissions, judges.

    Raises:
      UserError: an unknown task, missing or malformed files, or a missing permission.
    """
    if isinstance(tasks, str):
        raise UserError(f"tasks must be a list: [{tasks!r}]")
    if options.limit is not None and options.limit < 1:
        raise UserError(f"limit is {options.limit}; it must be 1 or more, or None")
    runs = [task.load(Path(data), options) for task in named_tasks(tasks)]
    language_model = model.language_model if isinstance(model, ChatModel) else model
    return [result for run in runs for result in run(language_model)]


def task_evaluator(
    tasks: Sequence[str],
    data: Path,
    *,
    protocol: Protocol = "instructeval",
    limit: int | None = None,
    template: Template | None = None,
) -> Evaluator:
    """Reads and checks benchmarks. The returned function scores a model: {"mmlu:5/faithful": mean, ...}.

    Args:
      tasks: Benchmarks (`mmlu`, `bbh:0`, `hhh`, `zero_shot`), or tasks of the harness.
      data: Directory of benchmark files, or of the harness's task files.
      limit: Problems per subject (InstructEval) or per task (harness).
      template: Harness only: the chat template for prompts; None for raw text.

    Raises:
      UserError: An unknown task, one that runs code or uses a judge, or missing or malformed files.
    """
    if protocol == "lm_eval":
        from flacuna_jax.evaluation import harness  # an optional dependency

        harness.check_tasks(tasks, data)

        def answer_harness(model: LanguageModel) -> dict[str, float]:
            results = harness.run_tasks(
                model, tasks, template=template, apply_chat_template=template is not None, limit=limit, include=data
            )
            return harness.metrics(results)

        return answer_harness
    runs = []
    for task in named_tasks(tasks):
        if task.benchmark.executes_code or task.benchmark.uses_judge:
            raise UserError(
                f"{task} runs code or uses a judge and cannot run during training; use `flacuna evaluate` afterwards"
            )
        runs.append(task.load(data, Options(limit=limit)))

    def answer(model: LanguageModel) -> dict[str, float]:
        return {
            f"{result.task}:{result.shots}/{score}": result.mean(score)
            for run in runs
            for result in run(model)
            for score in result.score_names
        }

    return answer
