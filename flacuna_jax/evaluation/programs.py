"""Benchmarks with generated code: the model completes a program, which runs in the sandbox together with its tests."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from flacuna_jax.evaluation.benchmark import Benchmark, Column, Options, Run, sampling_seed
from flacuna_jax.evaluation.results import Outcome, TaskResult
from flacuna_jax.evaluation.sandbox import DEFAULT_LIMITS, Limits, Verdict, isolation, run_programs
from flacuna_jax.evaluation.settings import SAMPLES
from flacuna_jax.generation.language_model import GenerationRequest, LanguageModel, encode_prompt


class CodeProblem(Protocol):
    @property
    def id(self) -> str: ...
    @property
    def question(self) -> str: ...
    def program(self, completion: str) -> str:
        """The completion and its tests: a program that ends without an exception if the tests pass."""


P = TypeVar("P", bound=CodeProblem)


@dataclass(frozen=True)
class CodeTask(Generic[P]):
    """A benchmark whose answers are executed. `expected` is as in `AnswerTask`."""

    name: str
    problems: tuple[P, ...]
    completions: Mapping[str, Callable[[str, P], str]]
    """Score name -> function that extracts the code from an answer."""
    temperature: Callable[[int], float]
    """Sampling temperature by the number of samples per problem."""
    top_k: int | None
    max_new_tokens: int
    expected: int


def code_benchmark(name: str, read: Callable[[Path], CodeTask[P]], column: Column) -> Benchmark:
    """A benchmark with generated code; `read` reads it from a directory."""

    def load(data: Path, options: Options) -> Run:
        whole_task = read(data)
        task = replace(whole_task, problems=whole_task.problems[: options.limit])
        return lambda model: [run_code(task, model, options[SAMPLES], workers=os.cpu_count() or 1)]

    return Benchmark(name, load, (column,), executes_code=True)


def run_code(
    task: CodeTask[P], model: LanguageModel, samples: int = 1, workers: int = 2, limits: Limits = DEFAULT_LIMITS
) -> TaskResult:
    """Generates answers, extracts the code from each with every function in `completions`, and runs it with its tests.

    The caller must have the user's permission (`sandbox.require_permission`). The scores are estimates of pass@k: the
    plain name for k = 1, and `name@10` and `name@100` with enough samples. `workers` programs run in parallel.
    """
    temperature = task.temperature(samples)
    requests = [
        GenerationRequest(
            # Answers may exceed the context, as in `run_answers`.
            encode_prompt(model.tokenizer, problem.question)[-model.context_length :],
            task.max_new_tokens,
            temperature=temperature,
            top_k=task.top_k,
            seed=sampling_seed(problem.id, sample),
        )
        for problem in task.problems
        for sample in range(samples)
    ]
    answers = [generation.text for generation in model.generate(requests)]
    asked = [problem for problem in task.problems for _ in range(samples)]
    codes = {
        name: [complete(answer, problem) for answer, problem in zip(answers, asked, strict=True)]
        for name, complete in task.completions.items()
    }
    programs = [p.program(code) for kept in codes.values() for p, code in zip(asked, kept, strict=True)]
    verdicts = iter(run_programs(programs, limits, workers))
    judged = {name: [next(verdicts) for _ in kept] for name, kept in codes.items()}
    outcomes = []
    for index, problem in enumerate(task.problems):
        tries = slice(index * samples, (index + 1) * samples)
        scores: dict[str, float] = {}
        for k in (1, 10, 100):
            if k <= samples:
                for name, all_verdicts in judged.items():
                    passed = sum(verdict.passed for verdict in all_verdicts[tries])
                    scores[name if k == 1 else f"{name}@{k}"] = pass_at_k(samples, passed, k)
        record = {
            "prompt": problem.question,
            "predictions": answers[tries],
            **{name: _record(codes[name][tries], judged[name][tries]) for name in codes},
        }
        outcomes.append(Outcome(problem.id, task.name, scores, record))
    settings = {"samples": samples, "temperature": temperature, "isolation": list(isolation())}
    return TaskResult(task.name, 0, model.name, tuple(outcomes), "micro", task.expected, settings=settings)


def _record(codes: Sequence[str], verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    return [{"code": code, "verdict": verdict.reason} for code, verdict in zip(codes, verdicts, strict=True)]


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """The unbiased estimate 1 - C(n-c, k) / C(n, k) of passing within k tries (Chen et al., 2021, section 2.1)."""
    if samples < k:
        raise ValueError(f"pass@{k} needs at least {k} samples, got {samples}")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)
