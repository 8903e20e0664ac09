"""Scores, with cases in which they differ."""

import pytest

from flacuna_jax.evaluation.labels import Question
from flacuna_jax.evaluation.scoring import drop_exact, drop_f1, equals_label, is_option, names_option, starts_with_label


@pytest.mark.parametrize(
    ("prediction", "label", "faithful", "corrected", "letter"),
    [
        (" A", "A", 1, 1, 1),
        ("A. because", "A", 1, 1, 1),
        ("(A) because", "A", 0, 1, 1),
        ("Apples", "A", 1, 0, 0),
        ("A's", "A", 1, 0, 0),
        ("B", "A", 0, 0, 1),
        ("E", "A", 0, 0, 0),
        ("The answer is A", "A", 0, 0, 0),
        ("", "A", 0, 0, 0),
    ],
)
def test_options(prediction: str, label: str, faithful: int, corrected: int, letter: int) -> None:
    question = Question("", label)
    assert starts_with_label(prediction, question) == faithful
    assert names_option(prediction, question) == corrected
    assert is_option(prediction, question) == letter


@pytest.mark.parametrize(
    ("prediction", "label", "faithful", "corrected"),
    [
        (" 45\n\nNext", "4", 1, 0),
        ("Not sure", "No", 1, 0),
        ("No.\n\nQ: more", "No", 1, 1),
        ("\n(B) the second", "(B)", 1, 1),
        ("] ) }", "] ) }", 1, 1),
        ("] ) } ]", "] ) }", 1, 0),
        ("False", "True", 0, 0),
    ],
)
def test_short_answers(prediction: str, label: str, faithful: int, corrected: int) -> None:
    question = Question("", label)
    assert starts_with_label(prediction, question) == faithful
    assert equals_label(prediction, question) == corrected


@pytest.mark.parametrize(
    ("prediction", "label", "exact", "f1"),
    [
        ("the Bears", "Bears", 1, 1),
        ("4.0", "4", 1, 1),
        ("4 yards", "4", 0, pytest.approx(2 / 3)),
        ("5 yards", "4 yards", 0, 0),  # numbers must agree
        ("Tom Brady", "Brady", 0, pytest.approx(2 / 3)),
        ("non-Hispanic", "non Hispanic", 1, 1),
        ("", "x", 0, 0),
    ],
)
def test_drop(prediction: str, label: str, exact: float, f1: float) -> None:
    question = Question("", label)
    assert drop_exact(prediction, question) == exact
    assert drop_f1(prediction, question) == f1
