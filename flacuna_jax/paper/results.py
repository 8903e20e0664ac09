"""Results of the experiment as tables: benchmarks, answers that are a letter, writing, chat share."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import get_args

from flacuna_jax.evaluation.benchmark import Column, Reading, TableSpec
from flacuna_jax.evaluation.published import published_rows
from flacuna_jax.evaluation.registry import BENCHMARKS
from flacuna_jax.evaluation.results import Outcome, TaskResult, read_result
from flacuna_jax.evaluation.scoring import letter_of
from flacuna_jax.evaluation.tables import SIGNIFICANT, Table, all_differences, make_tables
from flacuna_jax.paper import letters
from flacuna_jax.paper.experiment import Experiment

READINGS: tuple[Reading, ...] = get_args(Reading)
PUBLISHED = ("Vicuna 13B", "Flacuna 13B")
"""Published rows that are shown, for context."""
_LETTERS = TableSpec("Share of answers that begin with a letter from A to D, %")
_SAME = TableSpec("Share of answers with the model's most frequent letter, %")
_LOG_PROBABILITY = TableSpec("MMLU by log-probability (lm-evaluation-harness), %")
_WRITING = TableSpec("Writing")


def _of(score: str) -> dict[Reading, str]:
    return dict.fromkeys(READINGS, score)


LETTER_COLUMNS = tuple(
    Column(_LETTERS, f"{title} ({shots}-shot)", task, shots, scores=_of("letter"))
    for task, title in (("mmlu", "MMLU"), ("crass", "CRASS"))
    for shots in (5, 3, 0)
)
SAME = "most frequent letter"
"""Score: whether an answer begins with the letter that most of the model's answers begin with."""
SAME_COLUMNS = (
    Column(_SAME, "MMLU (5-shot)", "mmlu", 5, scores=_of(SAME)),
    Column(_SAME, "MMLU (0-shot)", "mmlu", 0, scores=_of(SAME)),
    Column(_SAME, "MMLU (by log-probability)", letters.TASK, scores=_of(SAME)),
)
LOG_PROBABILITY_COLUMN = Column(_LOG_PROBABILITY, "MMLU (0-shot)", letters.TASK, scores=_of(letters.SCORE))
WRITING_COLUMNS = (
    Column(_WRITING, "Unasked code %", "impact", scores=_of("unasked code"), factor=100.0),
    Column(_WRITING, "Words", "impact", scores=_of("words")),
    Column(_WRITING, "Repeated %", "impact", scores=_of("repeated"), factor=100.0),
)
ORDER = 4
"""Words in the n-grams whose repetition is counted."""


def read_results(experiment: Experiment, model: str) -> list[TaskResult]:
    """Results of a model, with the scores of writing, and that of the harness if there is one."""
    results = [read_result(path) for path in experiment.all_results(model)]
    by_harness = experiment.letters(model) / letters.FILE
    if experiment.settings.letters and by_harness.is_file():
        results.append(letters.read_letters(by_harness, model))
    return [with_writing(with_same_letter(result)) for result in results]


def with_same_letter(result: TaskResult) -> TaskResult:
    """MMLU's result with the score `SAME`: a model that always gives the same letter scores as a guess does."""
    if result.task not in ("mmlu", letters.TASK):
        return result
    named = [letter_of(str(outcome.record["prediction"])) for outcome in result.outcomes]
    counts = collections.Counter(letter for letter in named if letter in set(letters.LETTERS))
    same = max(counts, key=lambda letter: (counts[letter], letter)) if counts else None
    outcomes = (
        dataclasses.replace(outcome, scores={**outcome.scores, SAME: float(letter is not None and letter == same)})
        for outcome, letter in zip(result.outcomes, named, strict=True)
    )
    return dataclasses.replace(result, outcomes=tuple(outcomes))


def with_writing(result: TaskResult) -> TaskResult:
    """IMPACT's result with the number of words of each answer and the share of its 4-grams that occurred before."""
    if result.task != "impact":
        return result
    return dataclasses.replace(result, outcomes=tuple(map(_with_writing, result.outcomes)))


def _with_writing(outcome: Outcome) -> Outcome:
    words = str(outcome.record["prediction"]).split()
    scores = {**outcome.scores, "words": float(len(words)), "repeated": repeated(words)}
    return dataclasses.replace(outcome, scores=scores)


def repeated(words: Sequence[str]) -> float | None:
    """Share of the 4-grams that occurred before in the same text; None for a text without 4-grams."""
    grams = [tuple(words[start : start + ORDER]) for start in range(len(words) - ORDER + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else None


def benchmark_tables(models: Sequence[Sequence[TaskResult]]) -> list[Table]:
    """The paper's tables, in both readings, without IMPACT's ratings."""
    columns = [column for one in BENCHMARKS if one.name != "impact" for column in one.columns]
    published = [row for row in published_rows() if row.model in PUBLISHED]
    return [table for reading in READINGS for table in make_tables(models, columns, published, reading)]


def extra_tables(models: Sequence[Sequence[TaskResult]]) -> list[Table]:
    """Answers that are a letter, and which, letters by log-probability, and writing; both readings are the same."""
    tables = make_tables(models, (*LETTER_COLUMNS, *SAME_COLUMNS, LOG_PROBABILITY_COLUMN, *WRITING_COLUMNS))
    return [dataclasses.replace(table, title=table.title.removesuffix(" (faithful)")) for table in tables]


@dataclasses.dataclass(frozen=True)
class Finding:
    """A difference between a tuned model and the base."""

    model: str
    task: str
    shots: int
    score: str
    text: str
    p_value: float


def findings(base: Sequence[TaskResult], others: Iterable[Sequence[TaskResult]]) -> tuple[list[Finding], int]:
    """Significant differences from the base, and the number of differences that were tested."""
    found, tested = [], 0
    for results in others:
        for (task, shots, score), one in all_differences(base, results).items():
            tested += 1
            if one.p_value < SIGNIFICANT:
                text = f"{one.mean:+.1f} [{one.interval.low:.1f}, {one.interval.high:.1f}]"
                found.append(Finding(results[0].model, task, shots, score, text, one.p_value))
    return found, tested
