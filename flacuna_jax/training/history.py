"""What a run remembers of earlier steps: the results of evaluations, which determine the best checkpoints and whether
the run still improves, and the losses of the last steps.

Both are saved in the meta of every checkpoint, so that a resumed run decides and logs like an uninterrupted one.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

RECENT_STEPS = 20
"""Number of steps in the running mean of the loss."""


@dataclasses.dataclass
class RecentLosses:
    """Losses of the last steps that changed the parameters, whose mean varies less than the loss of one step."""

    values: list[float] = dataclasses.field(default_factory=list)

    def add(self, loss: float) -> None:
        self.values = [*self.values[1 - RECENT_STEPS :], loss]

    @property
    def mean(self) -> float | None:
        """None before the first step."""
        return math.fsum(self.values) / len(self.values) if self.values else None

    @classmethod
    def from_json(cls, stored: Sequence[float]) -> "RecentLosses":
        return cls(list(stored))


@dataclasses.dataclass
class History:
    """Measured values by step, in order. Earlier steps win ties; values that are not finite are the worst."""

    lower_is_better: bool
    values: dict[int, float] = dataclasses.field(default_factory=dict)
    last_step: int = -1
    """Step of the latest evaluation, including evaluations without a value."""

    def add(self, step: int, value: float | None) -> None:
        """Records an evaluation; `value` is None if it did not measure the metric."""
        self.last_step = step
        if value is not None:
            self.values[step] = value

    def best(self, count: int) -> list[int]:
        """Steps of the `count` best values, best first."""
        return sorted(self.values, key=lambda step: (self._badness(self.values[step]), step))[:count]

    @property
    def since_best(self) -> int:
        """Number of evaluations since the best one."""
        return len(self.values) - 1 - list(self.values).index(self.best(1)[0]) if self.values else 0

    def is_exhausted(self, patience: int | None) -> bool:
        """Whether the last `patience` evaluations were no new best."""
        return patience is not None and self.since_best >= patience

    def to_json(self) -> dict[str, Any]:
        values = [[step, value if math.isfinite(value) else None] for step, value in self.values.items()]
        return {"last_step": self.last_step, "values": values}

    @classmethod
    def from_json(cls, lower_is_better: bool, stored: Mapping[str, Any]) -> "History":
        values = {int(step): math.nan if value is None else value for step, value in stored["values"]}
        return cls(lower_is_better, values, stored["last_step"])

    def _badness(self, value: float) -> float:
        if not math.isfinite(value):
            return math.inf
        return value if self.lower_is_better else -value
