"""BIG-Bench Hard (Suzgun et al., 2022, arXiv:2210.09261) in InstructEval's protocol: answers only, no chain of thought,
no description of the task, and the first rows of the same file as worked examples, which are not scored.

Files: <task>.json {"examples": [{"input", "target"}]} (suzgunmirac/BIG-Bench-Hard), or <task>.jsonl / .parquet rows.
"""

from pathlib import Path

from flacuna_jax.errors import UserError
from flacuna_jax.evaluation.benchmark import FEW_SHOT, ZERO_SHOT
from flacuna_jax.evaluation.files import Row, field, read_rows
from flacuna_jax.evaluation.labels import AnswerTask, Problem, Question, answer_benchmark
from flacuna_jax.evaluation.scoring import equals_label, starts_with_label

TASKS = (
    "boolean_expressions",
    "causal_judgement",
    "date_understanding",
    "disambiguation_qa",
    "dyck_languages",
    "formal_fallacies",
    "geometric_shapes",
    "hyperbaton",
    "logical_deduction_five_objects",
    "logical_deduction_seven_objects",
    "logical_deduction_three_objects",
    "movie_recommendation",
    "multistep_arithmetic_two",
    "navigate",
    "object_counting",
    "penguins_in_a_table",
    "reasoning_about_colored_objects",
    "ruin_names",
    "salient_translation_error_detection",
    "snarks",
    "sports_understanding",
    "temporal_sequences",
    "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects",
    "tracking_shuffled_objects_three_objects",
    "web_of_lies",
    "word_sorting",
)
EXAMPLES = 6511
LAYOUT = "BIG-Bench Hard, <task>.json with {examples: [{input, target}]}, as suzgunmirac/BIG-Bench-Hard has under bbh/"


def load(data: Path, shots: int = 3) -> AnswerTask:
    """Reads every task that has a file; a result over fewer than 27 tasks is marked incomplete.

    Raises:
      UserError: No task has a file, a task has too few rows for the shots, or a row lacks input or target.
    """
    candidates = [f"{folder}{task}.{kind}" for folder in ("bbh/bbh/", "bbh/", "") for task in TASKS for kind in _KINDS]
    home = next((data / name for name in candidates if (data / name).is_file()), None)
    if home is None:
        raise UserError(f"{data} has no BBH task under bbh/; expected {LAYOUT}")
    files = {path.stem: path for kind in _KINDS for path in home.parent.glob(f"*.{kind}") if path.stem in TASKS}
    missing = [task for task in TASKS if task not in files]
    problems = [problem for task in TASKS if task in files for problem in _task(task, read_rows(files[task]), shots)]
    return AnswerTask(
        name="bbh",
        shots=shots,
        problems=tuple(problems),
        max_prompt=2048,
        max_new_tokens=32,
        average="macro",
        scores={"faithful": starts_with_label, "corrected": equals_label},
        expected=EXAMPLES - shots * len(TASKS),
        notes=(f"{len(missing)} of {len(TASKS)} tasks are missing: {', '.join(missing)}",) if missing else (),
    )


_KINDS = ("json", "jsonl", "parquet")


def _task(task: str, rows: list[Row], shots: int) -> list[Problem]:
    pairs = [(field(row, "input"), field(row, "target")) for row in rows]
    if len(pairs) <= shots:
        raise UserError(f"BBH's {task} has {len(pairs)} rows, too few for {shots} shots; is the file cut short?")
    solved = tuple(f"{asked}\nAnswer: {target}\n\n" for asked, target in pairs[:shots])
    questions = [Question(f"{asked}\nAnswer:", target, shots=solved) for asked, target in pairs[shots:]]
    return [Problem(f"{task}/{index}", task, q, q) for index, q in enumerate(questions, shots)]


BENCHMARK = answer_benchmark("bbh", "BBH", load, {3: FEW_SHOT, 0: ZERO_SHOT})
