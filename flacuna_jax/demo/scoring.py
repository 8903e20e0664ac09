"""Exact match by task family, and a table in the form of the paper's."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from flacuna_jax.demo.families import ANSWER_MARK


@dataclass(frozen=True)
class Question:
    """A held-out item: the user's prompt and the right reply."""

    family: str
    prompt: str
    target: str


@dataclass(frozen=True)
class FamilyScore:
    """Percentages over `count` held-out items.

    `exact`: the reply equals the target. `mentioned`: the last sentence of the reply contains the target. The
    difference shows how many errors are only errors of form.
    """

    family: str
    count: int
    exact: float
    mentioned: float


def read_questions(path: Path) -> list[Question]:
    """The records of a held-out file, in file order."""
    records = json.loads(path.read_text(encoding="utf-8"))
    return [Question(r["source"], r["conversations"][0]["value"], r["conversations"][1]["value"]) for r in records]


def is_exact(reply: str, target: str) -> bool:
    """Equality up to case, white space and a final full stop; for targets with reasoning, equality of the
    conclusion."""
    return _conclusion(reply) == _conclusion(target)


def is_mentioned(reply: str, target: str) -> bool:
    """Whether the reply's last sentence contains the words of the target's conclusion, in sequence."""
    said, wanted = _words(_conclusion(reply).rpartition(". ")[2]), _words(_conclusion(target))
    return any(said[at : at + len(wanted)] == wanted for at in range(len(said) - len(wanted) + 1))


def score(questions: Sequence[Question], replies: Sequence[str]) -> list[FamilyScore]:
    """One score per family, sorted by name."""
    scores = []
    for family in sorted({question.family for question in questions}):
        pairs = [(r, q.target) for q, r in zip(questions, replies, strict=True) if q.family == family]
        exact = 100 * sum(is_exact(*pair) for pair in pairs) / len(pairs)
        mentioned = 100 * sum(is_mentioned(*pair) for pair in pairs) / len(pairs)
        scores.append(FamilyScore(family, len(pairs), exact, mentioned))
    return scores


def average(scores: Sequence[FamilyScore]) -> FamilyScore:
    """The unweighted mean over families, like the paper's average over benchmarks."""
    exact, mentioned = (sum(getattr(s, name) for s in scores) / len(scores) for name in ("exact", "mentioned"))
    return FamilyScore("average", sum(s.count for s in scores), exact, mentioned)


def result_table(base: Sequence[FamilyScore], tuned: Sequence[FamilyScore]) -> Table:
    """Families in rows: exact match of base and tuned, and the difference in brackets as in the tables of the paper."""
    table = Table(title="Exact match on held-out items, greedy decoding (%)", title_justify="left")
    table.add_column("task family")
    for heading in ("items", "base", "Flacuna", "difference"):
        table.add_column(heading, justify="right")
    for before, after in zip(base, tuned, strict=True):
        table.add_row(*_row(before, after))
    table.add_section()
    table.add_row(*_row(average(base), average(tuned)), style="bold")
    return table


def _row(before: FamilyScore, after: FamilyScore) -> tuple[str, ...]:
    difference = f"({after.exact - before.exact:+.1f})"
    return before.family, str(before.count), f"{before.exact:.1f}", f"{after.exact:.1f}", difference


def _conclusion(text: str) -> str:
    text = text.rpartition(ANSWER_MARK)[2]
    return " ".join(text.split()).removesuffix(".").casefold()


def _words(text: str) -> list[str]:
    return "".join(character if character.isalnum() else " " for character in text).split()
