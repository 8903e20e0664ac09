"""The whole experiment on a model of 656K parameters, in this process, twice."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from flacuna_jax.cli import run_verb
from flacuna_jax.paper import __main__ as paper
from flacuna_jax.paper.stages import Stages

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(story_llama: Path, test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment with 12 records per run, one learning rate, and two prompts of each benchmark."""
    home = tmp_path_factory.mktemp("experiment")
    data = home / "data"
    data.mkdir()
    for name in ("crass", "vicuna_eval_questions"):
        (data / name).symlink_to(test_data / name)
    for name, count in (("tasks", 24), ("chat", 12)):
        rows = [
            {"instruction": f"Say {name} {number}.", "input": "", "output": f"{number}."} for number in range(count)
        ]
        (data / f"{name}.json").write_text(json.dumps(rows))
        source = {"name": name, "kind": "alpaca", "path": f"data/{name}.json", "examples": count}
        collection = {"output_dir": "out", "tokenizer": str(story_llama), "sources": [source]}
        (home / f"{name}.yaml").write_text(yaml.safe_dump(collection))
    training = {
        "output_dir": "out",
        "model": {"path": str(story_llama), "dtype": "float32"},
        "lora": {"rank": 2, "dropout": 0.0},
        "data": {"sources": [{"path": "x"}], "template": "vicuna_v1.1"},
        "training": {"micro_batch_size": 1, "remat": "none"},
        "mesh": {"fsdp": 1},
        "evaluation": {"sources": [{"path": "x"}], "samples": 0},
        "logging": {"every_steps": 1, "tensorboard": False},
    }
    (home / "lora.yaml").write_text(yaml.safe_dump(training))
    experiment = {
        "output_dir": str(home / "first"),
        "budget": "tiny",
        "base": str(story_llama),
        "data": str(data),
        "tasks": str(home / "tasks.yaml"),
        "chat": str(home / "chat.yaml"),
        "examples": 12,
        "held_out": 4,
        "chat_share": 0.25,
        "row_length": 256,
        "batch_size": 4,
        "methods": {"lora": {"config": str(home / "lora.yaml"), "rates": [1e-3, 1e-2]}},
        "sweep_examples": 4,
        "variants": {"chat50": {"method": "lora", "chat_share": 0.5}, "plain": {"method": "lora", "few_shot": 0.0}},
        "questions": {"Chat share": ["lora", "chat50"], "Few-shot grouping": ["lora", "plain"]},
        "benchmarks": [
            {"tasks": ["crass:0"], "limit": 2},
            {"tasks": ["impact"], "limit": 2, "options": ["--impact-new-tokens", "4"]},
        ],
    }
    path = home / "tiny.yaml"
    path.write_text(yaml.safe_dump(experiment))
    return path


@pytest.fixture(scope="module")
def first(config: Path) -> Path:
    """The output of the first run."""
    assert run_verb(paper.main, ["--config", str(config), "--publish", str(config.parent / "docs")]) == 0
    return config.parent / "first"


def test_the_page_has_every_table_and_picture(config: Path, first: Path) -> None:
    page = (config.parent / "docs" / "results.md").read_text()
    for heading in (
        "Data",
        "Learning rates",
        "Training",
        "Beside PEFT",
        "Benchmarks",
        "Chat share",
        "Few-shot grouping",
        "How to repeat this",
    ):
        assert f"\n## {heading}" in page
    assert "12 training records per run" in page
    assert "| lora − base |" in page
    assert "| chat50 − lora |" in page
    assert "| plain | lora | 25.0% chat records, 0% of the task records with worked examples |" in page
    assert "make paper BUDGET=tiny" in page
    for picture in page.split("](results/paper/")[1:]:
        assert (config.parent / "docs" / "results" / "paper" / picture.partition(")")[0]).is_file()
    losses = {name: json.loads((first / "stages" / f"train-{name}.json").read_text()) for name in ("lora", "chat50")}
    assert all(record["outputs"] for record in losses.values())


def test_a_second_run_gives_the_same_bytes(config: Path, first: Path) -> None:
    second = config.parent / "second"
    assert run_verb(paper.main, ["--config", str(config), f"--output_dir={second}"]) == 0
    compared = ["runs/lora/adapter/adapter_model.safetensors", "runs/chat50/adapter/adapter_model.safetensors"]
    compared += [str(path.relative_to(first)) for path in first.glob("evaluation/*/*/*.json")]
    assert len(compared) == 2 + 4 * 2
    for name in compared:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_a_finished_experiment_only_writes_its_page_again(
    config: Path, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise AssertionError("a stage ran again")

    shutil.rmtree(first / "page")
    monkeypatch.setattr(paper, "Stages", lambda directory, **options: Stages(directory, execute=fail, **options))
    assert run_verb(paper.main, ["--config", str(config)]) == 0
    assert (first / "page" / "results.md").is_file()


def test_too_few_records_are_an_error(config: Path, first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb(paper.main, ["--config", str(config), "--examples=40"]) == 2
    assert "lora needs 30 records of tasks, and there are" in capsys.readouterr().err
