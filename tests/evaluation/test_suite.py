"""Benchmarks by name, read once and run on several models, as in a training run."""

import shutil
from pathlib import Path

import pytest

from flacuna_jax.errors import UserError
from flacuna_jax.evaluation import crass
from flacuna_jax.evaluation.labels import run_answers
from flacuna_jax.evaluation.registry import BENCHMARKS, SUITES
from flacuna_jax.evaluation.suite import named_tasks, task_evaluator
from tests.evaluation.models import Scripted


@pytest.fixture
def data(test_data: Path, tmp_path: Path) -> Path:
    for name in ("crass", "hhh"):
        source = test_data / name
        shutil.copytree(source / "derived_bigbench_layout" if name == "hhh" else source, tmp_path / name)
    return tmp_path


def test_benchmarks_are_read_once_for_many_models(data: Path) -> None:
    evaluate = task_evaluator(["crass:0", "hhh"], data, limit=2)
    shutil.rmtree(data / "crass")  # nothing is read again
    found = [evaluate(Scripted(answer=lambda prompt, letter=letter: letter)) for letter in "AB"]
    assert set(found[0]) == {
        "crass:0/letter",
        *(f"{name}/{how}" for name in ("crass:0", "hhh_paper:0", "hhh_current:0") for how in ("faithful", "corrected")),
    }
    assert found[0]["crass:0/faithful"] != found[1]["crass:0/faithful"]


def test_means_equal_those_of_the_tables(data: Path) -> None:
    model = Scripted(answer=lambda prompt: " B")
    assert task_evaluator(["crass"], data)(model) == {
        f"crass:3/{score}": run_answers(crass.load(data, 3), model).mean(score)
        for score in ("faithful", "corrected", "letter")
    }


def test_suites_are_expanded_and_tasks_listed_once() -> None:
    def labels(*names: str) -> list[str]:
        return [str(task) for task in named_tasks(names)]

    assert labels("mmlu:0", "zero_shot", "hhh") == ["mmlu:0", "bbh:0", "crass:0", "hhh"]
    assert labels("mmlu", "mmlu:05", "mmlu:5", "drop") == ["mmlu:5", "drop:3"]


def test_suites_name_benchmarks_that_exist_and_are_named_once() -> None:
    names = [benchmark.name for benchmark in BENCHMARKS]
    assert len({*names, *SUITES}) == len(names) + len(SUITES)
    assert len(named_tasks(list(SUITES))) == len(SUITES["paper"])


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (["mmlo"], "unknown benchmark 'mmlo'"),
        (["hhh:3"], "hhh has no worked examples; write hhh"),
        (["mmlu:x"], "after the colon"),
        (["mmlu:²"], "after the colon"),
        (["paper"], "has no"),
        (["humaneval"], "cannot run during training"),
    ],
)
def test_mistakes_are_reported_before_a_model_is_needed(data: Path, tasks: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        task_evaluator(tasks, data)
