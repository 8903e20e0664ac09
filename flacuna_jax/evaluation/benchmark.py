"""The interface of benchmarks. Verbs, tables and training runs use only this; `registry.py` lists the benchmarks."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from flacuna_jax.data.conversation import Template
from flacuna_jax.evaluation.judge import Judge
from flacuna_jax.evaluation.results import TaskResult
from flacuna_jax.evaluation.settings import Setting
from flacuna_jax.generation.language_model import LanguageModel

T = TypeVar("T")
Reading = Literal["faithful", "corrected"]
Run = Callable[[LanguageModel], list[TaskResult]]
"""Evaluates a model on a benchmark whose data has been read and checked."""


@dataclass(frozen=True)
class Options:
    """Options of the user. Each benchmark reads those that apply to it; `options[SETTING]` is the value of a setting.

    `judge` and `templates` are functions because both read files: a benchmark calls them after it has read its data.
    """

    shots: int = 0
    """Worked examples per prompt."""
    limit: int | None = None
    """Keep only this many problems (per group, if the benchmark has groups)."""
    allow_code_execution: bool = False
    judge: Callable[[], Judge | None] = lambda: None
    """Makes the judge; None if the user named none."""
    templates: Callable[[], Mapping[str, Template | None]] = dict
    """Templates by the names of the models; None for raw text."""
    settings: Mapping[Setting[Any], Any] = field(default_factory=dict)

    def __getitem__(self, setting: Setting[T]) -> T:
        return self.settings.get(setting, setting.default)


@dataclass(frozen=True)
class TableSpec:
    """A table of the report. Benchmarks share a table by referring to the same object."""

    title: str
    average: bool = False
    """Adds a last column with the mean of the others."""


FEW_SHOT = TableSpec("Few-shot", average=True)
ZERO_SHOT = TableSpec("Zero-shot")


@dataclass(frozen=True)
class Column:
    """A column of a table: a score of a task, over all its problems or over one group of them."""

    table: TableSpec
    title: str
    task: str
    """`TaskResult.task`, which need not be the benchmark's name: a benchmark can have several results."""
    shots: int = 0
    published: str = ""
    """The column's key in `PublishedRow.scores`; empty if nothing was published."""
    scores: Mapping[Reading, str] = field(
        default_factory=lambda: {
            "faithful": "faithful",
            "corrected": "corrected",
        }  # each reading has a score with its name
    )
    """The score that each reading of the table shows."""
    group: str | None = None
    size: int = 0
    """Number of problems of the whole group; with fewer, the cell is marked incomplete."""
    decimals: int = 1
    factor: float = 1.0
    """Multiplies the mean: 100 shows a share as a percentage if the result's own scale is 1."""
    held_in: bool = False
    """FLAN-mini contains training data of this benchmark; cells are marked †."""


@dataclass(frozen=True, eq=False)
class Benchmark:
    """A benchmark.

    `load(data, options)` reads and checks files below `data` and returns a function that evaluates a model on them. It
    raises UserError for missing or malformed files and for unsuitable options. No model is loaded before it returns.
    """

    name: str
    """As in `--tasks`."""
    load: Callable[[Path, Options], Run]
    columns: tuple[Column, ...] = ()
    shots: int | None = None
    """Worked examples per prompt in the paper. None: the benchmark has none, so `name:3` is an error."""
    groupings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Further breakdowns in the summary of a result: name -> (group of problems -> larger group)."""
    executes_code: bool = False
    """Runs code that the model wrote: needs `--allow-code-execution`."""
    uses_judge: bool = False
    uses_template: bool = False
    """Formats prompts with the template of `--template`."""


def first_of_each(problems: Iterable[T], group: Callable[[T], str], limit: int | None) -> tuple[T, ...]:
    """The first `limit` problems of each group, in order; all problems without a limit."""
    kept, seen = [], dict[str, int]()
    for problem in problems:
        count = seen[group(problem)] = seen.get(group(problem), 0) + 1
        if limit is None or count <= limit:
            kept.append(problem)
    return tuple(kept)


def sampling_seed(problem: str, sample: int = 0) -> int:
    """A seed derived from a problem's id and the number of the sample, so that a run can be repeated."""
    return int.from_bytes(hashlib.sha256(f"{problem} {sample}".encode()).digest()[:4], "big")
