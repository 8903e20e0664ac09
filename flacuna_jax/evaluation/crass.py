"""CRASS, counterfactual conditionals (Frohberg & Binder, LREC 2022, 2022.lrec-1.229), in InstructEval's protocol.

File: CRASS_FTM_main_data_set.csv, ';' between columns, one header line: PCTID;BatchID;Premise;QCC;CorrectAnswer;
Answer1;Answer2;PossibleAnswer3. The first answer is right; the order of the options comes from random.seed(0) and one
shuffle per row, in file order. The worked examples are the paper's.
"""

import random
from pathlib import Path
from typing import NamedTuple

from flacuna_jax.errors import UserError
from flacuna_jax.evaluation.benchmark import FEW_SHOT, ZERO_SHOT
from flacuna_jax.evaluation.files import locate, read_csv, read_text
from flacuna_jax.evaluation.labels import AnswerTask, Problem, Question, answer_benchmark
from flacuna_jax.evaluation.scoring import is_option, names_option, starts_with_label

EXPECTED = 274
COLUMNS = ("PCTID", "BatchID", "Premise", "QCC", "CorrectAnswer", "Answer1", "Answer2", "PossibleAnswer3")
LAYOUT = f"CRASS, CRASS_FTM_main_data_set.csv of apergo-ai/CRASS-data-set with the columns {';'.join(COLUMNS)}"


class Item(NamedTuple):
    premise: str
    question: str
    options: tuple[str, ...]
    answer: str

    @property
    def label(self) -> str:
        return "ABCD"[self.options.index(self.answer)]

    def ask(self) -> str:
        options = "".join(f"\n{letter}. {option}" for letter, option in zip("ABCD", self.options, strict=False))
        return f"{self.premise.strip()} {self.question.strip()}{options}\nAnswer:"


EXAMPLES = (
    Item(
        "A feather falls from a skyscraper.",
        "What would have happened if a computer had fallen from the skyscraper?",
        (
            "The computer would have remained intact.",
            "That is not possible.",
            "The computer would have been crushed.",
        ),
        "The computer would have been crushed.",
    ),
    Item(
        "A lightning hits a tree.",
        "What would have happened if a marble would have hit the tree?",
        (
            "It would have burned down.",
            "Nothing special would have happened.",
            "The tree would have kissed the lightning.",
        ),
        "Nothing special would have happened.",
    ),
    Item(
        "A man drinks a beer.",
        "What would have happened if the man had drunk a rainbow?",
        ("It would have been tasty.", "It would have been awful.", "That is not possible."),
        "That is not possible.",
    ),
)


def load(data: Path, shots: int = 3) -> AnswerTask:
    """Raises UserError if the file is missing, its header is unexpected, or a row has fewer than two options."""
    if shots > len(EXAMPLES):
        raise UserError(f"crass has {len(EXAMPLES)} worked examples; {shots} shots are not possible")
    path = locate(data, ["crass/CRASS_FTM_main_data_set.csv", "CRASS_FTM_main_data_set.csv"], LAYOUT)
    header, *rows = read_csv(path, delimiter=";")
    if [name.strip() for name in header[: len(COLUMNS)]] != list(COLUMNS):
        raise UserError(f"{path}: the header is {';'.join(header)}; expected {LAYOUT}")
    as_written = _items(path, rows)
    lines = read_text(path).replace("\r\n", "\n").split("\n")[1:]
    as_split = _items(path, [line.strip().split(";") for line in lines if line.strip()])
    if len(as_written) != len(as_split):
        raise UserError(f"{path}: a quoted field runs over several lines; expected one row per line")
    solved = tuple(f"{item.ask()} {item.label}\n\n" for item in EXAMPLES[:shots])
    problems = []
    for index, (split, written) in enumerate(zip(as_split, as_written, strict=True)):
        faithful, corrected = (Question(item.ask(), item.label, shots=solved) for item in (split, written))
        problems.append(Problem(str(index), "crass", faithful, corrected))
    return AnswerTask(
        name="crass",
        shots=shots,
        problems=tuple(problems),
        max_prompt=2048,
        max_new_tokens=8,
        average="micro",
        scores={"faithful": starts_with_label, "corrected": names_option, "letter": is_option},
        expected=EXPECTED,
    )


def _items(path: Path, rows: list[list[str]]) -> list[Item]:
    shuffle = random.Random(0).shuffle
    items = []
    for number, row in enumerate(rows, 2):
        options = [option.strip() for option in row[4:8] if option.strip()]
        if len(options) < 2:
            raise UserError(f"{path}, line {number}: expected at least two answers from column 5 on, found {row}")
        answer = options[0]
        shuffle(options)
        items.append(Item(row[2], row[3], tuple(options), answer))
    return items


BENCHMARK = answer_benchmark("crass", "CRASS", load, {3: FEW_SHOT, 0: ZERO_SHOT})
