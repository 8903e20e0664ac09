"""Published numbers with their sources (published.json), for comparison."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PublishedRow:
    """Published scores of a model. Their keys are "task/shots", "hhh/category" or "impact/category/aspect"."""

    model: str
    source: str
    scores: Mapping[str, float]
    held_in: bool
    """Whether the model was trained on FLAN-mini, so that scores in `Column.held_in` columns are marked."""


def published_rows() -> tuple[PublishedRow, ...]:
    """Rows, each of one model and one table; a model can have several rows."""
    content = json.loads(Path(__file__).with_name("published.json").read_text("utf-8"))
    return tuple(
        PublishedRow(row["model"], content["sources"][row["source"]], row["scores"], row.get("held_in", False))
        for row in content["rows"]
    )


def published_remarks() -> tuple[str, ...]:
    """Remarks about the rows."""
    content = json.loads(Path(__file__).with_name("published.json").read_text("utf-8"))
    return tuple(content["remarks"])
