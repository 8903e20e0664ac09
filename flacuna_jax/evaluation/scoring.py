"""Compares predictions with labels: InstructEval's lossy rule, and corrected rules."""

import re
import string

from flacuna_jax.evaluation.labels import Question


def starts_with_label(prediction: str, question: Question) -> float:
    """InstructEval's rule: the stripped prediction starts with the label ("45" matches "4", "Not" matches "No")."""
    return float(prediction.strip().startswith(question.label))


_LETTER = re.compile(r"\(?([A-Z])(?![A-Za-z0-9'’])")


def letter_of(prediction: str) -> str | None:
    """The letter that the prediction begins with as a word: "C", "C.", "(C) ..." but not "Cats"."""
    found = _LETTER.match(prediction.strip())
    return found.group(1) if found else None


def names_option(prediction: str, question: Question) -> float:
    """The prediction begins with the option's letter as a word."""
    return float(letter_of(prediction) == question.label)


def is_option(prediction: str, question: Question) -> float:
    """The prediction begins with a letter from A to D as a word, right or wrong: the model answers in the format."""
    return float(letter_of(prediction) in set("ABCD"))


def first_line(prediction: str) -> str:
    """The first line that is not blank."""
    return prediction.strip().split("\n", 1)[0].strip()


def equals_label(prediction: str, question: Question) -> float:
    """The first line is the label, ignoring a final full stop; the text of an option may follow a label like "(B)"."""
    answer = first_line(prediction)
    if re.fullmatch(r"\([A-Z]\)", question.label):
        return float(answer.startswith(question.label))
    return float(question.label in (answer, answer.removesuffix(".")))


_ARTICLES = re.compile(r"\b(a|an|the)\b")


def drop_words(text: str) -> list[str]:
    """DROP's normal form (Dua et al., 2019): lower case, split at spaces and hyphens, no punctuation or articles,
    numbers as numbers."""
    words = []
    for raw in re.split(r"[ \-]", text.lower()):
        word = raw if _number(raw) is not None else "".join(c for c in raw if c not in string.punctuation)
        number = _number(word)
        word = str(number) if number is not None else _ARTICLES.sub(" ", word)
        words += word.split()
    return words


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def drop_exact(prediction: str, question: Question) -> float:
    """Exact match in DROP's normal form, on the first line."""
    return float(drop_words(first_line(prediction)) == drop_words(question.label))


def drop_f1(prediction: str, question: Question) -> float:
    """DROP's F1 over bags of words; 0 if the label has numbers and the prediction has none of them."""
    predicted, gold = set(drop_words(first_line(prediction))), set(drop_words(question.label))
    numbers = {word for word in gold if _number(word) is not None}
    if numbers and not numbers & predicted:
        return 0.0
    common = len(predicted & gold)
    if not common:
        return float(predicted == gold)
    precision, recall = common / len(predicted), common / len(gold)
    return 2 * precision * recall / (precision + recall)
