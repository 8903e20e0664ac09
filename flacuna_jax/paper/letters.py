"""`python -m flacuna_jax.paper.letters RESULT --output DIR`: a task of lm-evaluation-harness from a result of MMLU.

The harness scores the letters A to D after the zero-shot prompts of InstructEval, by log-probability. InstructEval
generates an answer, so a model that knows it but writes something else first gets no point.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flacuna_jax.arguments import Parser
from flacuna_jax.cli import run_verb
from flacuna_jax.errors import UserError
from flacuna_jax.evaluation.results import Outcome, TaskResult, read_result
from flacuna_jax.whole_files import write_atomically

TASK = "mmlu_letters"
SCORE = "acc"
"""The harness's name of the accuracy."""
LETTERS = "ABCD"
TASK_FILE, QUESTIONS = f"{TASK}.yaml", "questions.jsonl"
FILE = "lm_eval.json"
"""What `flacuna evaluate --protocol lm_eval` writes for a model."""


def main(argv: Sequence[str] | None = None) -> int | None:
    parser = Parser("paper.letters", __doc__)
    parser.add_argument("result", metavar="RESULT", help="mmlu-0shot.json of `flacuna evaluate`")
    parser.add_argument("--output", required=True, metavar="DIR")
    arguments = parser.parse_args(argv)
    write_task(Path(arguments.result), Path(arguments.output))
    return None


def write_task(result: Path, directory: Path) -> None:
    """Writes the harness's task file and its questions: those of a zero-shot result of MMLU."""
    outcomes = read_result(result).outcomes
    rows = [{"prompt": outcome.record["prompt"], "answer": outcome.record["label"]} for outcome in outcomes]
    if wrong := {row["answer"] for row in rows} - set(LETTERS):
        raise UserError(f"{result}: the label {min(wrong)!r} is not one of the letters {LETTERS}")
    questions = directory / QUESTIONS
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(questions, "".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions.absolute())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": list(LETTERS),
        "doc_to_target": f"{{{{'{LETTERS}'.index(answer)}}}}",
        "metric_list": [{"metric": SCORE}],
    }
    write_atomically(directory / TASK_FILE, json.dumps(task, indent=1))  # JSON is YAML


def read_letters(path: Path, model: str) -> TaskResult:
    """The harness's result as one of this package."""
    samples = sorted(json.loads(path.read_text("utf-8"))["samples"][TASK], key=lambda sample: sample["doc_id"])
    outcomes = tuple(
        Outcome(str(one["doc_id"]), "", {SCORE: float(one[SCORE])}, {"prediction": _likeliest(one)}) for one in samples
    )
    return TaskResult(TASK, 0, model, outcomes, "micro", len(outcomes))


def _likeliest(sample: Mapping[str, Any]) -> str:
    """The letter with the largest log-probability; the harness stores a pair of that and another value for each."""
    return max(zip(LETTERS, sample["filtered_resps"], strict=True), key=lambda pair: float(pair[1][0]))[0]


if __name__ == "__main__":
    raise SystemExit(run_verb(main))
