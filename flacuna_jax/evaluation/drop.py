"""DROP (Dua et al., 2019, arXiv:1903.00161) in InstructEval's protocol: prefix match instead of EM and F1, over the
questions of the validation set on which all annotators agree, except those whose passage is in a worked example.

Files: rows {section_id, query_id, passage, question, answers_spans: {spans, types}} (.jsonl or .parquet, the Hugging
Face form), or the original drop_dataset_dev.json, or simple-evals' drop_v0_dev.jsonl(.gz). The last has no boundaries
between spans; results from it have a note.
"""

import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from flacuna_jax.errors import UserError
from flacuna_jax.evaluation.benchmark import FEW_SHOT
from flacuna_jax.evaluation.files import Row, field, locate, read_json, read_rows
from flacuna_jax.evaluation.labels import AnswerTask, Problem, Question, answer_benchmark
from flacuna_jax.evaluation.scoring import drop_exact, drop_f1, starts_with_label

EXPECTED = 6285
LAYOUT = (
    "DROP's validation set: drop_dataset_dev.json, Hugging Face rows (.parquet or .jsonl with passage, question, "
    "answers_spans), or simple-evals' drop_v0_dev*.jsonl.gz"
)
PATTERNS = ("drop_dataset_dev.json", "validation*.parquet", "validation*.jsonl", "drop_v0_dev*.jsonl.gz", "drop.json*")


class Item(NamedTuple):
    id: str
    passage: str
    question: str
    answers: tuple[str, ...]
    """Spans of all annotators, stripped."""


def load(data: Path, shots: int = 3) -> AnswerTask:
    """Reads, filters and draws the worked examples as the original does (random.seed(0)).

    Raises:
      UserError: No file, a record in none of the three forms, or too few usable questions for the shots.
    """
    path = locate(data, [f"{folder}{name}" for folder in ("drop/", "drop/data/", "") for name in PATTERNS], LAYOUT)
    items, notes = read_items(path)
    agreed = [item for item in items if len(set(item.answers)) == 1]
    if len(agreed) <= shots:
        raise UserError(f"{path}: {len(agreed)} questions have a unanimous answer, too few for {shots} shots")
    examples = random.Random(0).sample(agreed, k=shots)
    shown = {item.passage for item in examples}
    solved = tuple(f"{_ask(item)} {item.answers[0]}\n\n" for item in examples)
    problems = []
    for item in agreed:
        if item.passage not in shown:
            question = Question(_ask(item), item.answers[0], shots=solved)
            problems.append(Problem(item.id, "drop", question, question))
    return AnswerTask(
        name="drop",
        shots=shots,
        problems=tuple(problems),
        max_prompt=2048,
        max_new_tokens=8,
        average="micro",
        scores={"faithful": starts_with_label, "corrected": drop_exact, "f1": drop_f1},
        expected=EXPECTED,
        notes=notes,
    )


def _ask(item: Item) -> str:
    return f"{item.passage.strip()} {item.question.strip()}\nAnswer:"


def read_items(path: Path) -> tuple[list[Item], tuple[str, ...]]:
    """Questions of a file in any of the three forms, and notes about the form."""
    if path.name.endswith(".json"):
        content = read_json(path)
        if isinstance(content, dict) and content and all(_is_section(section) for section in content.values()):
            return list(_original(path, content)), ()
    rows = read_rows(path)
    if rows and "ref_text" in rows[0].value:
        note = "answers of several spans cannot be told from single ones in the simple-evals form"
        return [_simple_evals(row) for row in rows], (note,)
    return [_hugging_face(row) for row in rows], ()


def _is_section(section: Any) -> bool:
    return isinstance(section, dict) and "passage" in section and "qa_pairs" in section


def _hugging_face(row: Row) -> Item:
    answers = field(row, "answers_spans", dict)
    if not answers.get("spans"):
        raise UserError(f"{row.place}: answers_spans has no spans")
    spans = tuple(str(span).strip() for span in answers["spans"])
    return Item(field(row, "query_id"), field(row, "passage"), field(row, "question"), spans)


def _original(path: Path, sections: dict[str, Any]) -> Iterable[Item]:
    """Rows as from Hugging Face's loader: with validated answers, and without records of mixed kinds."""
    for name, section in sections.items():
        for pair in section["qa_pairs"]:
            row = Row(f"{path}, {name}", pair)
            answers = field(row, "validated_answers", list) or [field(row, "answer", dict)]
            kinds = [_spans(answer) for answer in answers]
            if all(kind is not None for kind in kinds) and any(kinds):
                spans = tuple(span.strip() for kind in kinds if kind for span in kind)
                yield Item(field(row, "query_id"), section["passage"], field(row, "question"), spans)


def _spans(answer: dict[str, Any]) -> list[str] | None:
    """The spans of one annotator; None if the answer has two kinds at once."""
    date = answer.get("date") or {}
    parts = [date.get(part, "") for part in ("day", "month", "year")]
    found: list[list[str]] = []
    if answer.get("number", "") != "":
        found.append([str(answer["number"])])
    if any(parts):
        found.append([" ".join(parts).strip()])
    if answer.get("spans"):
        found.append(list(answer["spans"]))
    if len(found) > 1:
        return None
    return found[0] if found else []


_FLAT = re.compile(r"Passage: (?P<passage>.*)\nQuestion: (?P<question>.*)\nAnswer:\s*", re.DOTALL)


def _simple_evals(row: Row) -> Item:
    flat = _FLAT.fullmatch(field(row, "context"))
    if flat is None:
        raise UserError(f"{row.place}: context is not 'Passage: ...\\nQuestion: ...\\nAnswer:'")
    answers = tuple(answer.strip() for answer in field(row, "ref_text").split("|"))
    return Item(row.place.rsplit(" ", 1)[-1], flat["passage"], flat["question"], answers)


# Held-in: FLAN-mini contains drop:2.0.0 and Natural Instructions' DROP tasks.
BENCHMARK = answer_benchmark("drop", "DROP", load, {3: FEW_SHOT}, held_in=True)
