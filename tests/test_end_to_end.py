"""`python -m flacuna_jax.train` as run by a user: from scratch to a verified adapter, interrupted and continued."""

import functools
import json
import os
import shlex
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from flacuna_jax import train
from flacuna_jax.cli import main as flacuna
from flacuna_jax.cli import run_verb
from flacuna_jax.config.files import load_config, parse_config
from flacuna_jax.config.run import MeshConfig
from flacuna_jax.data.tokenization import Tokenizer
from flacuna_jax.huggingface.tokenizer import load_tokenizer
from flacuna_jax.run.deliver import what_next
from flacuna_jax.training.loop import StateHook, StepHook
from tests.small_run import write_run

pytestmark = pytest.mark.usefixtures("compiled_once")


SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "num_heads": 2}


def run(config: Path, *overrides: str, hooks: Sequence[StepHook | StateHook] = ()) -> int:
    return run_verb(functools.partial(train.main, hooks=hooks), ["--config", str(config), *overrides])


def losses(directory: Path, key: str = "loss") -> dict[int, float]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return {record["step"]: record[key] for record in map(json.loads, lines) if key in record}


def adapter_bytes(directory: Path) -> bytes:
    return (directory / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, compiled_once: None) -> Path:
    """An uninterrupted run: 60 examples, two epochs."""
    directory = tmp_path_factory.mktemp("finished")
    assert run(write_run(directory)) == 0
    return directory


def test_a_run_writes_the_documented_files(finished, capsys):
    directory = finished / "run"
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "adapter"} <= {path.name for path in directory.iterdir()}
    record = json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])
    for field in (
        "step",
        "loss",
        "grad_norm",
        "learning_rate",
        "examples",
        "rows",
        "tokens",
        "supervised_tokens",
        "fill",
    ):
        assert field in record
    tensors = load_file(directory / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 2  # layers × targets × (A, B)
    assert all(np.abs(tensor).max() > 0 for tensor in tensors.values())
    assert load_config(directory / "config.yaml").mesh != "auto"
    curve = losses(directory)
    assert np.mean(list(curve.values())[-3:]) < np.mean(list(curve.values())[:3])


def test_every_step_of_two_epochs_is_logged_once(finished):
    curve = losses(finished / "run")
    assert list(curve) == list(range(1, len(curve) + 1))
    records = [json.loads(line) for line in (finished / "run" / "metrics.jsonl").read_text().splitlines()]
    for epoch in (0, 1):
        assert sum(record["examples"] for record in records if record["epoch"] == epoch) == 60


class Stopped(Exception):
    pass


def at_step(number: int, action: Callable[[], object]) -> list[StepHook]:
    """Hooks that do something to the world once the results of step `number` are there."""
    return [StepHook(at=(number,), call=lambda record, state: action())]


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def run_until(step: int, config: Path, *overrides: str) -> None:
    """Breaks off after `step`, as a crash does; the run must come that far."""

    def stop() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        run(config, *overrides, hooks=at_step(step, stop))


@pytest.mark.parametrize("at", [4, 7, 11])
def test_interrupted_runs_continue_to_the_same_bytes(finished, tmp_path, at):
    """Stopped after step `at` (first epoch, second epoch), packed, with dropout; checkpoints every 3 steps."""
    shutil.copytree(finished / "tokenizer", tmp_path / "tokenizer")
    config = finished / "config.yaml"
    out = f"--output_dir={tmp_path / 'run'}"
    run_until(at, config, out)
    assert not (tmp_path / "run" / "adapter").exists()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9')  # as after a power cut

    assert run(config, out) == 0
    assert losses(tmp_path / "run") == losses(finished / "run")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(finished / "run")


def test_running_a_finished_run_again_changes_nothing(finished):
    before = adapter_bytes(finished / "run"), losses(finished / "run")
    assert run(finished / "config.yaml") == 0
    assert (adapter_bytes(finished / "run"), losses(finished / "run")) == before


@pytest.mark.parametrize(
    ("model", "lora", "commands"),
    [
        ({"path": "my base"}, {}, ["chat --run runs/x", "evaluate --run runs/x --compare base", "export runs/x OUT"]),
        ({"path": "my base"}, None, ["chat --run runs/x", "evaluate --run runs/x --compare 'my base'"]),
        ({"init": "random", "tokenizer": "t", "architecture": SIZES}, None, ["chat --run runs/x"]),
        ({"init": "random", "tokenizer": "t", "architecture": SIZES}, {}, []),
    ],
)
def test_a_run_ends_with_commands_that_use_its_result(model, lora, commands):
    """Only the commands that its base, from disk or random, permits."""
    config = parse_config(
        {"output_dir": "runs/x", "model": model, "lora": lora, "data": {"sources": [{"path": "data.json"}]}}
    )
    report, *others = what_next(config)
    assert report == "report     runs/x/report.html"
    assert len(others) == len(commands)
    assert all(f"flacuna {command}" in line for command, line in zip(commands, others, strict=True))


def test_four_devices_give_the_same_run(finished, tmp_path):
    automatic = ["--mesh=auto", "--training.remat=auto"]
    assert run(finished / "config.yaml", f"--output_dir={tmp_path / 'run'}", *automatic) == 0
    resolved = load_config(tmp_path / "run" / "config.yaml")
    assert resolved.mesh == MeshConfig(fsdp=4)
    assert resolved.training.remat == "dots"
    expected, actual = losses(finished / "run"), losses(tmp_path / "run")
    assert list(actual) == list(expected)
    np.testing.assert_allclose(list(actual.values()), list(expected.values()), atol=1e-5)


def test_a_run_in_the_directory_of_its_data_is_an_error(finished, tmp_path, capsys):
    """It could not be resumed, because the next start would read metrics.jsonl as data."""
    shutil.copy(finished / "data.json", tmp_path)
    for out, source in (
        (tmp_path / "run", tmp_path),
        (tmp_path, tmp_path),
        (tmp_path / "run", f"{tmp_path}/**/*.json*"),
    ):
        assert run(finished / "config.yaml", f"--output_dir={out}", f"--data.sources.0.path={source}") == 2
        assert f"output_dir {out} is inside {source}, whose files are all read as data" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]


@pytest.mark.parametrize("text", ["{{{ not: yaml", "\0\0\0", "an_old_setting: 3\n", "text"])
def test_a_damaged_config_of_the_run_does_not_prevent_resuming(finished, tmp_path, text):
    """It has the resolved `auto` settings; the relevant settings are in the checkpoints."""
    shutil.copytree(finished / "run", tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text(text)
    automatic = ["--mesh=auto", "--training.remat=auto"]
    assert run(finished / "config.yaml", f"--output_dir={tmp_path / 'run'}", *automatic) == 0
    assert load_config(tmp_path / "run" / "config.yaml").mesh != "auto"


@pytest.mark.slow
def test_lora_can_start_from_the_model_of_full_fine_tuning(finished, tmp_path, capsys):
    base = tmp_path / "base"
    assert run(finished / "config.yaml", f"--output_dir={base}", "--lora=null", "--training.max_steps=4") == 0
    assert (base / "model" / "config.json").is_file()
    converted = tmp_path / "converted"
    assert flacuna(["convert", str(base / "model"), str(converted)]) == 0

    results = []
    for name, model in (("hf", base / "model"), ("native", converted)):
        overrides = [f"--output_dir={tmp_path / name}", f"--model={{path: {model}, dtype: float32}}"]
        assert run(finished / "config.yaml", *overrides, "--training.max_steps=4") == 0
        results.append(adapter_bytes(tmp_path / name))
    assert results[0] == results[1], "a Hugging Face directory and its conversion are the same model"

    merged = tmp_path / "merged"
    assert flacuna(["export", str(tmp_path / "hf"), str(merged), "--format", "merged"]) == 0
    assert (merged / "model.safetensors").is_file()
    assert (merged / "tokenizer.model").read_bytes() == (finished / "tokenizer" / "tokenizer.model").read_bytes()
    assert (
        run(
            finished / "config.yaml",
            f"--output_dir={tmp_path / 'on'}",
            f"--model={{path: {merged}}}",
            "--training.max_steps=2",
        )
        == 0
    )


def test_training_can_start_from_an_adapter(finished, tmp_path, capsys):
    """The first loss of the second run is that of the base with the first run's adapter, not with a new one."""
    first, out = finished / "run" / "adapter", f"--output_dir={tmp_path / 'run'}"
    assert run(finished / "config.yaml", out, f"--lora.init_from={first}", "--training.max_steps=1") == 0
    fresh = losses(finished / "run")[1]
    assert losses(tmp_path / "run")[1] < fresh - 0.05
    other = ["--lora.rank=3", "--lora.alpha=7.5", "--lora.layers_to_transform=[1]", f"--lora.init_from={first}"]
    capsys.readouterr()
    assert run(finished / "config.yaml", out + "2", *other, "--training.max_steps=1") == 2
    said = capsys.readouterr().err
    advice = shlex.split(said.partition("set them with: ")[2])
    assert len(advice) == 3
    assert run(finished / "config.yaml", out + "2", *other, "--training.max_steps=1", *advice) == 0


def test_the_tokenizer_implements_the_protocol(finished):
    tokenizer: Tokenizer = load_tokenizer(finished / "tokenizer")
    assert tokenizer.encode("</s>") != [tokenizer.eos_id]


MISTAKES = {
    "no such data": (["--data.sources.0.path=nowhere.json"], "nowhere.json"),
    "no such model": (["--model={path: nowhere}"], "nowhere"),
    "no such tokenizer": (["--model.tokenizer=nowhere"], "nowhere"),
    "too many devices": (["--mesh={data: 3, fsdp: 2}"], "mesh"),
    "tensor through a head": (["--mesh={tensor: 3}"], "mesh.tensor"),
    "rows that do not divide": (
        ["--training.batch_unit=rows", "--training.batch_size=3", "--mesh.fsdp=2"],
        "batch_size",
    ),
    "warm-up longer than the run": (["--training.warmup_steps=500"], "warmup_steps"),
    "vocabulary beyond the embedding": (["--model.architecture.vocab_size=50"], "embedding"),
    "nothing fits": (["--data.max_length=8"], "max_length"),
    "unknown key": (["--training.bach_size=3"], "training.batch_size"),
}


@pytest.mark.parametrize(("overrides", "hint"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_exit_with_status_2_and_one_message(finished, tmp_path, capsys, overrides, hint):
    status = run(finished / "config.yaml", f"--output_dir={tmp_path / 'run'}", *overrides)
    said = capsys.readouterr().err
    assert status == 2, said
    assert hint in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists(), "a mistake leaves nothing behind"


def test_a_torn_data_file_is_named_with_its_line(finished, tmp_path, capsys):
    torn = tmp_path / "torn.jsonl"
    torn.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "c", "out')
    assert run(finished / "config.yaml", f"--output_dir={tmp_path / 'run'}", f"--data.sources.0.path={torn}") == 2
    said = capsys.readouterr().err
    assert "torn.jsonl" in said
    assert "2" in said


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ("--training.learning_rate=0.5", "training.learning_rate"),
        ("--lora.dropout=0.0", "lora.dropout"),
        ("--seed=7", "seed"),
        ("--data.train_on=all", "data"),
    ],
)
def test_resuming_with_a_changed_setting_is_an_error(finished, capsys, change, names):
    before = losses(finished / "run")
    assert run(finished / "config.yaml", change) == 2
    assert names in capsys.readouterr().err
    assert losses(finished / "run") == before


def test_a_change_can_be_allowed_by_name(finished, tmp_path, capsys):
    """Half the data and another epoch: an error with a diff, then continued with allow_changes."""
    shutil.copytree(finished / "run", tmp_path / "run")
    fewer = tmp_path / "fewer.json"
    fewer.write_text(json.dumps(json.loads((finished / "data.json").read_text())[:40]))
    changed = [f"--output_dir={tmp_path / 'run'}", f"--data.sources.0.path={fewer}", "--training.epochs=4"]
    assert run(finished / "config.yaml", *changed) == 2
    said = capsys.readouterr().err
    assert "fingerprints.data: " in said
    assert "training.epochs: 2 in the checkpoint, 4 now" in said
    allow = said.partition("--checkpoint.allow_changes=")[2].split("]")[0] + "]"
    assert run(finished / "config.yaml", *changed, f"--checkpoint.allow_changes={allow}") == 0
    assert "accepted by checkpoint.allow_changes: fingerprints.data" in capsys.readouterr().out
    before, after = losses(finished / "run"), losses(tmp_path / "run")
    assert {step: after[step] for step in before} == before
    assert len(after) > len(before)
    assert list(after) == list(range(1, len(after) + 1))


def test_a_used_directory_is_an_error_with_resume_never(finished, capsys):
    assert run(finished / "config.yaml", "--checkpoint.resume=never") == 2
    assert "output_dir" in capsys.readouterr().err
