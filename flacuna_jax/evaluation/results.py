"""Results of an evaluation: every prompt, prediction and score, and means of scores."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from flacuna_jax.errors import UserError
from flacuna_jax.whole_files import write_atomically


@dataclass(frozen=True)
class Outcome:
    """An answered problem. `scores` maps the name of each score to a number; `record` has prompts and predictions."""

    id: str
    group: str
    scores: Mapping[str, float | None]
    """None if a score does not apply to the problem, which is then excluded from the mean."""
    record: Mapping[str, Any]


@dataclass(frozen=True)
class TaskResult:
    """The result of one model on a benchmark.

    `scale` multiplies scores for display: 100 for percentages, 1 for ratings from 1 to 5.
    """

    task: str
    shots: int
    model: str
    outcomes: tuple[Outcome, ...]
    average: Literal["micro", "macro"]
    expected: int
    scale: float = 100.0
    notes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return len(self.outcomes) == self.expected

    @property
    def score_names(self) -> tuple[str, ...]:
        return tuple(self.outcomes[0].scores) if self.outcomes else ()

    def scored(self, score: str) -> "TaskResult":
        """The result on the problems to which the score applies."""
        return replace(self, outcomes=tuple(o for o in self.outcomes if o.scores.get(score) is not None))

    def values(self, score: str) -> NDArray[np.float64]:
        """Values of a score, one per problem; all problems must have the score."""
        return np.array([outcome.scores[score] for outcome in self.outcomes], np.float64)

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(outcome.group for outcome in self.outcomes))

    def weights(self) -> NDArray[np.float64]:
        """Weight of each problem, with sum 1. Micro: equal weights. Macro: equal total weight of every group."""
        if self.average == "micro":
            return np.full(len(self.outcomes), 1 / len(self.outcomes))
        sizes = {group: sum(o.group == group for o in self.outcomes) for group in self.groups}
        return np.array([1 / (len(sizes) * sizes[outcome.group]) for outcome in self.outcomes])

    def mean(self, score: str) -> float:
        """Mean over the problems to which the score applies, in the task's scale; NaN if there are none."""
        result = self.scored(score)
        if not result.outcomes:
            return float("nan")
        if self.average == "micro":
            return float(result.values(score).mean()) * self.scale
        return float(np.mean(list(result.by_group(score).values())))

    def by_group(self, score: str, names: Mapping[str, str] | None = None) -> dict[str, float]:
        """Means over the problems of each group, or of each larger group that `names` maps groups to."""
        members: dict[str, list[float]] = {}
        scored = self.scored(score)
        for outcome, value in zip(scored.outcomes, scored.values(score), strict=True):
            group = outcome.group if names is None else names[outcome.group]
            members.setdefault(group, []).append(value * self.scale)
        return {group: float(np.mean(scores)) for group, scores in members.items()}


def write_result(result: TaskResult, path: Path, summary: Mapping[str, Any]) -> None:
    """Writes one JSON file atomically, with the summary first, then every outcome."""
    content = {"summary": dict(summary), **asdict(result)}
    write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1))


def read_result(path: Path) -> TaskResult:
    """Reads a file of `write_result`. Raises UserError for any other file."""
    try:
        content = json.loads(path.read_text("utf-8"))
        content.pop("summary")
        content["outcomes"] = tuple(Outcome(**outcome) for outcome in content["outcomes"])
        content["notes"] = tuple(content["notes"])
        return TaskResult(**content)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not a result file of an evaluation: {error}") from None
