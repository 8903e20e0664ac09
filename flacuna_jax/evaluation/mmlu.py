"""MMLU (Hendrycks et al., 2021, arXiv:2009.03300) in InstructEval's protocol: the answer letter is generated.

Files: {dev,test}/<subject>_{dev,test}.csv without header, columns question, A, B, C, D, answer. The original reads them
with pandas, which turns the option "NA" into "nan" and 1.50 into 1.5; so does the faithful reading.
"""

from collections.abc import Sequence
from pathlib import Path

from flacuna_jax.errors import UserError
from flacuna_jax.evaluation.benchmark import FEW_SHOT, ZERO_SHOT
from flacuna_jax.evaluation.files import locate, read_csv
from flacuna_jax.evaluation.labels import AnswerTask, Problem, Question, answer_benchmark
from flacuna_jax.evaluation.scoring import is_option, names_option, starts_with_label
from flacuna_jax.evaluation.settings import MMLU_SPLIT

LETTERS = "ABCD"
EXPECTED = 14042
LAYOUT = "{dev,test}/<subject>_{dev,test}.csv of hendrycks/test's data.tar (no header; question, A, B, C, D, answer)"

SUBCATEGORIES: dict[str, tuple[str, ...]] = {
    "math": (
        "abstract_algebra",
        "college_mathematics",
        "elementary_mathematics",
        "high_school_mathematics",
        "high_school_statistics",
    ),
    "health": (
        "anatomy",
        "clinical_knowledge",
        "college_medicine",
        "human_aging",
        "medical_genetics",
        "nutrition",
        "professional_medicine",
        "virology",
    ),
    "physics": ("astronomy", "college_physics", "conceptual_physics", "high_school_physics"),
    "business": ("business_ethics", "management", "marketing"),
    "biology": ("college_biology", "high_school_biology"),
    "chemistry": ("college_chemistry", "high_school_chemistry"),
    "computer science": (
        "college_computer_science",
        "computer_security",
        "high_school_computer_science",
        "machine_learning",
    ),
    "economics": ("econometrics", "high_school_macroeconomics", "high_school_microeconomics"),
    "engineering": ("electrical_engineering",),
    "philosophy": (
        "formal_logic",
        "logical_fallacies",
        "moral_disputes",
        "moral_scenarios",
        "philosophy",
        "world_religions",
    ),
    "other": ("global_facts", "miscellaneous", "professional_accounting"),
    "history": ("high_school_european_history", "high_school_us_history", "high_school_world_history", "prehistory"),
    "geography": ("high_school_geography",),
    "politics": (
        "high_school_government_and_politics",
        "public_relations",
        "security_studies",
        "us_foreign_policy",
    ),
    "psychology": ("high_school_psychology", "professional_psychology"),
    "culture": ("human_sexuality", "sociology"),
    "law": ("international_law", "jurisprudence", "professional_law"),
}
CATEGORIES: dict[str, tuple[str, ...]] = {
    "STEM": ("physics", "chemistry", "biology", "computer science", "math", "engineering"),
    "humanities": ("history", "philosophy", "law"),
    "social sciences": ("politics", "culture", "economics", "geography", "psychology"),
    "other (business, health, misc.)": ("other", "business", "health"),
}
SUBCATEGORY_OF = {subject: name for name, subjects in SUBCATEGORIES.items() for subject in subjects}
CATEGORY_OF = {
    subject: category
    for category, subcategories in CATEGORIES.items()
    for subcategory in subcategories
    for subject in SUBCATEGORIES[subcategory]
}


def load(data: Path, shots: int = 5, split: str = "test") -> AnswerTask:
    """Reads every subject that has a file of the split.

    Raises:
      UserError: no data, a subject without its dev file or with fewer examples than shots, an unknown subject, or a
        row without exactly six columns.
    """
    home = locate(data, [f"mmlu/data/{split}", f"mmlu/{split}", f"data/mmlu/{split}", split], f"MMLU, {LAYOUT}").parent
    files = sorted((home / split).glob(f"*_{split}.csv"))
    if not files:
        raise UserError(f"{home / split} has no <subject>_{split}.csv; expected {LAYOUT}")
    problems = [problem for file in files for problem in _subject(home, file, split, shots)]
    return AnswerTask(
        name="mmlu",
        shots=shots,
        problems=tuple(problems),
        max_prompt=2048,
        max_new_tokens=2,
        average="micro",
        scores={"faithful": starts_with_label, "corrected": names_option, "letter": is_option},
        expected=EXPECTED,
        notes=() if split == "test" else (f"scored on the {split} split",),
    )


def _subject(home: Path, file: Path, split: str, shots: int) -> list[Problem]:
    subject = file.name.removesuffix(f"_{split}.csv")
    if subject not in SUBCATEGORY_OF:
        raise UserError(f"{file}: {subject!r} is not one of MMLU's {len(SUBCATEGORY_OF)} subjects")
    examples = home / "dev" / f"{subject}_dev.csv"
    if not examples.is_file():
        raise UserError(f"{examples} is missing: the worked examples of {subject}; expected {LAYOUT}")
    readings = []
    for read in (_read_as_pandas, _read_as_text):
        solved = tuple(f"{_ask(row)} {row[-1]}\n\n" for row in read(examples)[:shots])
        readings.append([Question(_ask(row), row[-1], header(subject), solved) for row in read(file)])
        if len(solved) < shots:
            raise UserError(f"{examples} has {len(solved)} worked examples; {shots} shots are not possible")
    return [
        Problem(f"{subject}/{index}", subject, faithful, corrected)
        for index, (faithful, corrected) in enumerate(zip(*readings, strict=True))
    ]


def header(subject: str) -> str:
    """The original's subject starts with a space, so there are two spaces after "about"."""
    described = "".join(f" {word}" for word in subject.split("_"))
    return f"The following are multiple choice questions (with answers) about {described}.\n\n"


def _ask(row: Sequence[str]) -> str:
    question, *options, _ = row
    lines = (f"\n{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True))
    return question + "".join(lines) + "\nAnswer:"


def _read_as_pandas(path: Path) -> list[list[str]]:
    import pandas  # takes a second

    _read_as_text(path)  # for its error messages
    return [
        [f"{cell}" for cell in row] for row in pandas.read_csv(path, header=None).itertuples(index=False, name=None)
    ]


def _read_as_text(path: Path) -> list[list[str]]:
    rows = read_csv(path)
    for number, row in enumerate(rows, 1):
        if len(row) != 6 or row[-1] not in tuple(LETTERS):
            raise UserError(f"{path}, row {number}: expected question, four options and A, B, C or D; found {row[:7]}")
    return rows


BENCHMARK = answer_benchmark(
    "mmlu",
    "MMLU",
    load,
    {5: FEW_SHOT, 0: ZERO_SHOT},
    groupings={"subcategories": SUBCATEGORY_OF, "categories": CATEGORY_OF},
    settings={"split": MMLU_SPLIT},
)
