"""MMLU by log-probability: lm-evaluation-harness scores the letters A to D after the zero-shot prompts of InstructEval.

InstructEval generates an answer, so a model that knows it but writes something else first gets no point. The harness
compares the log-probabilities of the four letters, whatever the model would write.
"""

import json
from pathlib import Path

from flacuna_jax.errors import UserError
from flacuna_jax.evaluation.results import Outcome, TaskResult, read_result
from flacuna_jax.whole_files import write_atomically

TASK = "mmlu_letters"
SCORE = "acc"
"""The harness's name of the accuracy."""
LETTERS = "ABCD"
FILE = "lm_eval.json"
"""What `flacuna evaluate --protocol lm_eval` writes for a model."""


def write_task(result: Path, directory: Path) -> None:
    """Writes the harness's task file and its questions: those of a zero-shot result of MMLU."""
    outcomes = read_result(result).outcomes
    rows = [{"prompt": outcome.record["prompt"], "answer": outcome.record["label"]} for outcome in outcomes]
    if wrong := {row["answer"] for row in rows} - set(LETTERS):
        raise UserError(f"{result}: the label {min(wrong)!r} is not one of the letters {LETTERS}")
    questions = directory / "questions.jsonl"
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
    write_atomically(directory / f"{TASK}.yaml", json.dumps(task, indent=1))  # JSON is YAML


def read_letters(path: Path, model: str) -> TaskResult:
    """The harness's result as one of this package."""
    samples = sorted(json.loads(path.read_text("utf-8"))["samples"][TASK], key=lambda sample: sample["doc_id"])
    outcomes = tuple(Outcome(str(one["doc_id"]), "", {SCORE: float(one[SCORE])}, {}) for one in samples)
    return TaskResult(TASK, 0, model, outcomes, "micro", len(outcomes))
