"""Benchmarks by name: found, read and checked once, then answered by any model, as often as it is asked.

`flacuna evaluate` makes its tables of them; a training run asks `task_evaluator` once before its first step and calls
what it gets on the parameters of the moment.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from flacuna_jax.data.conversation import Template
from flacuna_jax.errors import UserError
from flacuna_jax.evaluation import bbh, crass, drop, hhh, mmlu
from flacuna_jax.evaluation.benchmark import AnswerTask
from flacuna_jax.evaluation.results import TaskResult
from flacuna_jax.evaluation.run import run_answers, run_hhh
from flacuna_jax.generation.language_model import LanguageModel

Protocol = Literal["instructeval", "lm_eval"]
Run = Callable[[LanguageModel], list[TaskResult]]
Evaluator = Callable[[LanguageModel], dict[str, float]]

ANSWER_TASKS: dict[str, tuple[Callable[[Path, int], AnswerTask], int]] = {
    "mmlu": (mmlu.load, 5),
    "bbh": (bbh.load, 3),
    "drop": (drop.load, 3),
    "crass": (crass.load, 3),
}
"""Benchmarks that are answered and compared with a label, and their shots in the paper."""
OTHER_TASKS = ("humaneval", "hhh", "impact")
GROUPS = {
    "few_shot": ("mmlu:5", "bbh:3", "drop:3", "crass:3", "humaneval"),
    "zero_shot": ("mmlu:0", "bbh:0", "crass:0"),
    "paper": ("mmlu:5", "bbh:3", "drop:3", "crass:3", "humaneval", "mmlu:0", "bbh:0", "crass:0", "hhh", "impact"),
}


def named_tasks(names: Sequence[str]) -> tuple[str, ...]:
    """Task names with groups and shots spelled out, each once, in their order.

    Raises UserError for a name of nothing.
    """
    spelled: dict[str, None] = {}
    for task in (part for name in names for part in GROUPS.get(name.strip(), (name.strip(),))):
        name, colon, shots = task.partition(":")
        if name not in ANSWER_TASKS and (name not in OTHER_TASKS or colon):
            known = ", ".join([*ANSWER_TASKS, *OTHER_TASKS, *GROUPS])
            raise UserError(f"no benchmark {task!r}; there are {known} (mmlu:0 asks for 0 shots)")
        if colon and not shots.isdecimal():
            raise UserError(f"benchmark {task!r}: the number of shots goes behind the colon, as in mmlu:5")
        spelled[f"{name}:{int(shots) if colon else ANSWER_TASKS[name][1]}" if name in ANSWER_TASKS else name] = None
    return tuple(spelled)


def answer_run(task: str, data: Path, limit: int | None = None) -> Run:
    """What answers an ANSWER_TASKS benchmark (`mmlu:0`); `limit` keeps the first problems of each group."""
    name, _, shots = task.partition(":")
    loaded = ANSWER_TASKS[name][0](data, int(shots))
    if limit is not None:
        kept, seen = [], dict.fromkeys((problem.group for problem in loaded.problems), 0)
        for problem in loaded.problems:
            seen[problem.group] += 1
            if seen[problem.group] <= limit:
                kept.append(problem)
        loaded = replace(loaded, problems=tuple(kept))
    return lambda model: [run_answers(loaded, model)]


def hhh_run(data: Path, limit: int | None = None, repetitions: int = 1) -> Run:
    """What compares HHH's answers by both protocols; `limit` keeps the first of each category."""
    comparisons = hhh.load(data)
    if limit is not None:
        comparisons = tuple(c for c in comparisons if int(c.id.split("/")[1]) < limit)
    return lambda model: [
        run_hhh(comparisons, model, "paper", repetitions),
        run_hhh(comparisons, model, "current"),
    ]


def task_evaluator(
    tasks: Sequence[str],
    data: Path,
    *,
    protocol: Protocol = "instructeval",
    limit: int | None = None,
    template: Template | None = None,
) -> Evaluator:
    """Reads and checks benchmarks; what is returned scores a model on them: "mmlu:5/faithful" -> mean, and so on.

    Args:
      tasks: benchmarks (`mmlu`, `bbh:0`, `hhh`, `zero_shot`), or the harness's tasks.
      data: the directory of benchmark files, or of the harness's task files.
      limit: problems per subject (InstructEval) or per task (harness).
      template: harness only: what its prompts are put into as a user's turn; None for raw text.

    Raises:
      UserError: a task that there is not, or that runs code or needs a judge; files that are missing or misshapen.
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
        if task in ("humaneval", "impact"):
            raise UserError(f"{task} runs code or needs a judge: `flacuna evaluate` does that, when a run has ended")
        runs.append(hhh_run(data, limit) if task == "hhh" else answer_run(task, data, limit))

    def answer(model: LanguageModel) -> dict[str, float]:
        return {
            f"{result.task}:{result.shots}/{score}": result.mean(score)
            for run in runs
            for result in run(model)
            for score in result.score_names
        }

    return answer


def evaluate_tasks(
    model: LanguageModel,
    tasks: Sequence[str],
    data: Path,
    *,
    protocol: Protocol = "instructeval",
    limit: int | None = None,
    template: Template | None = None,
) -> dict[str, float]:
    """`task_evaluator` on one model, once."""
    return task_evaluator(tasks, data, protocol=protocol, limit=limit, template=template)(model)
