"""Benchmarks with labels: prompts with worked examples, fitted to the context, and answers compared with labels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from flacuna_jax.evaluation.benchmark import Benchmark, Column, Options, Run, TableSpec, first_of_each
from flacuna_jax.evaluation.results import Outcome, TaskResult
from flacuna_jax.evaluation.settings import Setting
from flacuna_jax.generation.language_model import Generation, GenerationRequest, LanguageModel, encode_prompt

ScoreFunction = Callable[[str, "Question"], float]


@dataclass(frozen=True)
class Question:
    """One prompt in its parts: header, then worked examples, then the question that the model completes."""

    text: str
    label: str
    header: str = ""
    shots: tuple[str, ...] = ()

    def prompt(self, shots: int) -> str:
        """The prompt with the first `shots` worked examples."""
        return self.header + "".join(self.shots[:shots]) + self.text


@dataclass(frozen=True)
class Problem:
    """A question as the original code reads it, and as it is in the file; they differ if the original loses text."""

    id: str
    group: str
    """Subject, task or category, for macro averages and breakdowns."""
    faithful: Question
    corrected: Question


@dataclass(frozen=True)
class AnswerTask:
    """A benchmark whose answers are compared with labels.

    `average`: "micro" is the mean over problems, "macro" the mean over groups of their means. `max_prompt` and
    `max_new_tokens` are in tokens (a prompt's BOS counts). `expected` is the number of problems of the published
    benchmark; a result with another number is incomplete, and tables mark it. `scores` has a function for each score,
    "faithful" and "corrected" among them; all but "faithful" score the answer to the corrected question.
    """

    name: str
    shots: int
    problems: tuple[Problem, ...]
    max_prompt: int
    max_new_tokens: int
    average: Literal["micro", "macro"]
    scores: Mapping[str, ScoreFunction]
    expected: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FittedPrompt:
    text: str
    shots: int
    """Number of worked examples that remain."""
    tokens: int
    """Length of the prompt, including BOS."""


def fit_shots(question: Question, count_tokens: Callable[[str], int], limit: int) -> FittedPrompt:
    """Drops worked examples from the end until the prompt has at most `limit` tokens.

    A question that is too long by itself stays whole, as in the original.
    """
    for shots in range(len(question.shots), -1, -1):
        prompt = question.prompt(shots)
        tokens = count_tokens(prompt)
        if tokens <= limit or shots == 0:
            return FittedPrompt(prompt, shots, tokens)
    raise AssertionError("the loop returns at zero shots")


def answer_benchmark(
    name: str,
    title: str,
    read: Callable[..., AnswerTask],
    tables: Mapping[int, TableSpec],
    groupings: Mapping[str, Mapping[str, str]] | None = None,
    held_in: bool = False,
    settings: Mapping[str, Setting[Any]] | None = None,
) -> Benchmark:
    """A benchmark with labels.

    Args:
      read: Reads it from a directory, with the given number of worked examples: read(data, shots, **settings).
      tables: The table for each number of worked examples that is reported; the first number is the default.
      groupings: As in `Benchmark`.
      held_in: As in `Column`.
      settings: Arguments of `read` that are options of the command.
    """

    def load(data: Path, options: Options) -> Run:
        whole = read(data, options.shots, **{name: options[setting] for name, setting in (settings or {}).items()})
        task = replace(whole, problems=first_of_each(whole.problems, lambda problem: problem.group, options.limit))
        return lambda model: [run_answers(task, model)]

    columns = (
        Column(table, f"{title} ({shots}-shot)", name, shots, f"{name}/{shots}", held_in=held_in)
        for shots, table in tables.items()
    )
    return Benchmark(name, load, tuple(columns), shots=next(iter(tables)), groupings=groupings or {})


def run_answers(task: AnswerTask, model: LanguageModel) -> TaskResult:
    """Generates the answer to every problem and computes all scores of the task.

    If the faithful and the corrected question differ, both are asked. As in the original, an answer may exceed the
    model's context. A question that exceeds the context even without worked examples loses its first tokens, and its
    record has their number; in the original, the prompt would exceed the context.
    """
    fitted: dict[tuple[Question, int], FittedPrompt] = {}

    def fit(question: Question) -> FittedPrompt:
        key = (question, len(question.shots))
        if key not in fitted:
            fitted[key] = fit_shots(question, lambda text: len(encode_prompt(model.tokenizer, text)), limit)
        return fitted[key]

    context = model.context_length
    limit = min(task.max_prompt, context)
    asked: list[FittedPrompt] = []
    for problem in task.problems:
        asked += [fit(problem.faithful), fit(problem.corrected)]
    requests = [
        GenerationRequest(encode_prompt(model.tokenizer, prompt.text)[-context:], task.max_new_tokens)
        for prompt in asked
    ]
    answers = model.generate(requests)
    outcomes, cut, unreachable = [], 0, 0
    for index, problem in enumerate(task.problems):
        pairs = [(asked[i], answers[i]) for i in (2 * index, 2 * index + 1)]
        (faithful, prediction), (corrected, corrected_prediction) = pairs
        scores = {
            name: score(prediction.text, problem.faithful)
            if name == "faithful"
            else score(corrected_prediction.text, problem.corrected)
            for name, score in task.scores.items()
        }
        record = _answer_record(problem.faithful, faithful, prediction, context)
        if corrected.text != faithful.text:
            record["corrected"] = _answer_record(problem.corrected, corrected, corrected_prediction, context)
        cut += faithful.tokens > context
        unreachable += len(model.tokenizer.encode(problem.faithful.label)) > task.max_new_tokens
        outcomes.append(Outcome(problem.id, problem.group, scores, record))
    notes = list(task.notes)
    if cut:
        notes.append(f"{cut} prompts longer than the context of {context} lost their beginning")
    if unreachable:
        notes.append(f"{unreachable} labels are longer than {task.max_new_tokens} tokens and cannot be matched")
    return TaskResult(
        task.name, task.shots, model.name, tuple(outcomes), task.average, task.expected, notes=tuple(notes)
    )


def _answer_record(question: Question, prompt: FittedPrompt, answer: Generation, context: int) -> dict[str, Any]:
    return {
        "prompt": prompt.text,
        "shots": prompt.shots,
        "prompt_tokens": prompt.tokens,
        "tokens_cut": max(0, prompt.tokens - context),
        "label": question.label,
        "prediction": answer.text,
    }
