"""Published numbers with their sources (published.json), for comparison."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PublishedRow:
    """`scores` are keyed like table cells: "mmlu/5" (task/shots), "hhh/harmless", "impact/creative/coherence"."""

    model: str
    source: str
    scores: Mapping[str, float]
    held_in: bool
    """The model was trained on FLAN-mini, so that scores of `Column.held_in` are marked."""


def published_rows() -> tuple[PublishedRow, ...]:
    """Rows of one model and one table each; a model can have several."""
    content = json.loads(Path(__file__).with_name("published.json").read_text("utf-8"))
    return tuple(
        PublishedRow(row["model"], content["sources"][row["source"]], row["scores"], row.get("held_in", False))
        for row in content["rows"]
    )


def published_remarks() -> tuple[str, ...]:
    """Notes about the rows."""
    content = json.loads(Path(__file__).with_name("published.json").read_text("utf-8"))
    return tuple(content["remarks"])
