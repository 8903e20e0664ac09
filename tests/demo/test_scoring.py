"""The criteria for right answers in the demo's table."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from flacuna_jax.demo.scoring import (
    FamilyScore,
    Question,
    average,
    is_exact,
    is_mentioned,
    read_questions,
    result_table,
    score,
)


@pytest.mark.parametrize(
    ("reply", "target", "right"),
    [
        ("cold", "cold", True),
        (" Cold.", "cold", True),
        ("The opposite of hot is cold.", "cold", False),
        ("", "cold", False),
        ("12", "1", False),
        ("Ben is older. The answer: Anna.", "Anna is older. The answer: Anna.", True),
        ("Anna is older. The answer: Ben.", "Anna is older. The answer: Anna.", False),
        ("Anna", "Anna is older. The answer: Anna.", True),
        ('{"name": "Leo", "city": "Rome"}', '{"name": "Leo", "city": "Rome"}', True),
        ('{"name": "Leo", "city": "Oslo"}', '{"name": "Leo", "city": "Rome"}', False),
    ],
)
def test_exact(reply: str, target: str, right: bool) -> None:
    assert is_exact(reply, target) is right


@pytest.mark.parametrize(
    ("reply", "target", "right"),
    [
        ("Good question! The opposite of hot is cold.", "cold", True),
        ("It is not cold. It is warm.", "cold", False),
        ("It is colder.", "cold", False),
        ("3 plus 9 is 12.", "1", False),
        ("So Anna is the oldest.", "Anna is older than Ben. The answer: Anna.", True),
        ("", "cold", False),
    ],
)
def test_mentioned(reply: str, target: str, right: bool) -> None:
    assert is_mentioned(reply, target) is right


def test_scores_by_family_and_their_average() -> None:
    questions = [Question("b", "?", "x"), Question("a", "?", "x"), Question("b", "?", "y"), Question("b", "?", "z")]
    scores = score(questions, ["x", "it is x", "no", "no"])
    assert [(s.family, s.count) for s in scores] == [("a", 1), ("b", 3)]
    assert [s.exact for s in scores] == pytest.approx([0, 100 / 3])
    assert [s.mentioned for s in scores] == pytest.approx([100, 100 / 3])
    assert average(scores).exact == pytest.approx(100 / 6)  # families have equal weights, items do not
    assert average(scores).count == 4


def test_the_table_shows_both_and_the_difference() -> None:
    base, tuned = [FamilyScore("lists", 40, 12.5, 50.0)], [FamilyScore("lists", 40, 95.0, 95.0)]
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(result_table(base, tuned))
    text = console.export_text()
    for line_start in ("lists", "average"):
        line = next(line for line in text.splitlines() if line_start in line)
        assert all(figure in line for figure in ("40", "12.5", "95.0", "(+82.5)"))


def test_questions_come_from_flan_mini_records(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "2 + 2 ="}, {"from": "gpt", "value": "4"}]
    path = tmp_path / "held_out.json"
    path.write_text(json.dumps([{"id": "1", "source": "arithmetic", "conversations": turns}]))
    assert read_questions(path) == [Question("arithmetic", "2 + 2 =", "4")]
