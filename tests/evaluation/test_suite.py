"""Benchmarks by name, read once and answered by any model: what a training run evaluates with."""

import shutil
from pathlib import Path

import pytest

from flacuna_jax.errors import UserError
from flacuna_jax.evaluation.run import run_answers
from flacuna_jax.evaluation.suite import ANSWER_TASKS, evaluate_tasks, named_tasks, task_evaluator
from tests.evaluation.models import Scripted


@pytest.fixture
def data(test_data: Path, tmp_path: Path) -> Path:
    for name in ("crass", "hhh"):
        source = test_data / name
        shutil.copytree(source / "derived_bigbench_layout" if name == "hhh" else source, tmp_path / name)
    return tmp_path


def test_one_reading_serves_many_models(data: Path) -> None:
    evaluate = task_evaluator(["crass:0", "hhh"], data, limit=2)
    shutil.rmtree(data / "crass")  # nothing is read again
    found = [evaluate(Scripted(answer=lambda prompt, letter=letter: letter)) for letter in "AB"]
    assert set(found[0]) == {
        f"{name}/{score}" for name in ("crass:0", "hhh_paper:0", "hhh_current:0") for score in ("faithful", "corrected")
    }
    assert found[0]["crass:0/faithful"] != found[1]["crass:0/faithful"]


def test_means_are_those_of_the_tables(data: Path) -> None:
    model = Scripted(answer=lambda prompt: " B")
    load, shots = ANSWER_TASKS["crass"]
    assert evaluate_tasks(model, ["crass"], data) == {
        f"crass:{shots}/{score}": run_answers(load(data, shots), model).mean(score)
        for score in ("faithful", "corrected")
    }


def test_groups_are_spelled_out_once() -> None:
    assert named_tasks(["mmlu:0", "zero_shot", "hhh"]) == ("mmlu:0", "bbh:0", "crass:0", "hhh")
    assert named_tasks(["mmlu", "mmlu:05", "mmlu:5", "drop"]) == ("mmlu:5", "drop:3")


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["mmlo"], "no benchmark 'mmlo'"),
        (["hhh:3"], "no benchmark 'hhh:3'"),
        (["mmlu:x"], "behind the colon"),
        (["mmlu:²"], "behind the colon"),
        (["paper"], "holds no"),
        (["humaneval"], "when a run has ended"),
    ],
)
def test_mistakes_are_told_before_any_model_is_asked(data: Path, tasks: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        task_evaluator(tasks, data)
