"""A record that makes the loss NaN is found and written to a file; the run skips it or stops, also after a restart."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flacuna_jax.huggingface.tokenizer import load_tokenizer
from flacuna_jax.run import training_run
from tests.small_run import records, write_run
from tests.test_end_to_end import adapter_bytes, losses, run, run_until

pytestmark = pytest.mark.usefixtures("compiled_once")

POISON = "§"
"""A character of one record only; the embeddings of its byte tokens are NaN."""


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory, compiled_once) -> Path:
    """A base model with NaN embeddings for tokens of one record, which occurs twice per run (two epochs)."""
    directory = tmp_path_factory.mktemp("poisoned")
    config = write_run(directory)
    base = directory / "base"
    overrides = ["--lora=null", "--training.max_steps=1", f"--output_dir={base}"]
    assert run(config, *overrides) == 0
    model = base / "model" / "model.safetensors"
    tensors = load_file(model)
    tokenizer = load_tokenizer(directory / "tokenizer")
    spelled = set(tokenizer.encode(f"a {POISON} b")) - set(tokenizer.encode("a b"))
    bad = sorted(spelled - set(tokenizer.encode(" ".join(r["conversations"][0]["value"] for r in records(60)))))
    assert bad
    embedding = tensors["model.embed_tokens.weight"].copy()
    embedding[bad] = np.nan
    save_file({**tensors, "model.embed_tokens.weight": embedding}, model, {"format": "pt"})
    made = records(60)
    made[17]["conversations"][0]["value"] += f" {POISON}"
    made[17]["id"] = "the culprit"
    (directory / "data.json").write_text(json.dumps(made))
    return directory


def overrides_of(poisoned: Path, out: Path, *more: str) -> list[str]:
    model = f"--model={{path: {poisoned / 'base' / 'model'}, dtype: float32}}"
    return [f"--output_dir={out}", model, *more]


@pytest.fixture(scope="module")
def skipped(poisoned, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("skipped") / "run"
    assert run(poisoned / "config.yaml", *overrides_of(poisoned, out, "--training.on_bad_step=skip")) == 0
    return out


def bad_steps(out: Path) -> dict[int, dict]:
    return {int(path.stem): json.loads(path.read_text()) for path in (out / "bad_steps").iterdir()}


def test_skipping_continues_and_writes_the_batch_and_the_bad_record(skipped):
    found = bad_steps(skipped)
    assert len(found) == 2, "once per epoch"
    curve = losses(skipped)
    assert [step for step, loss in curve.items() if loss is None] == sorted(found)
    for step, kept in found.items():
        assert kept["step"] == step
        examples = [example for row in kept["rows"] for example in row]
        guilty = [example for example in examples if example["loss"] == "nan"]
        assert [example["id"] for example in guilty] == ["the culprit"]
        assert guilty[0]["record"]["conversations"][0]["value"].endswith(POISON)
        assert "data.json" in guilty[0]["place"]
        assert guilty[0]["record_number"] == 17
        assert POISON in "".join(piece["text"] for piece in guilty[0]["seen"])
        assert all(isinstance(example["loss"], float) for example in examples if example not in guilty)
        assert all(len(example["ids"]) == example["tokens"] for example in examples)
    last = json.loads((skipped / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["skipped"] == 2
    tensors = load_file(skipped / "adapter" / "adapter_model.safetensors")
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())


def test_stopping_names_the_step_and_the_policy_may_change_on_resume(poisoned, skipped, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(poisoned / "config.yaml", *overrides_of(poisoned, out)) == 1
    said = capsys.readouterr().err
    first = min(bad_steps(skipped))
    assert f"error: step {first}: loss nan" in said
    assert "'the culprit'" in said
    assert "Traceback" not in said
    assert list(bad_steps(out)) == [first]
    assert f"ended at a bad step: step {first}: loss nan, gradient norm nan" in (out / "report.html").read_text()
    assert not (out / "adapter").exists()
    # The policy may be changed on resume; the results then equal those of the run that skipped from the start.
    assert run(poisoned / "config.yaml", *overrides_of(poisoned, out, "--training.on_bad_step=skip")) == 0
    assert adapter_bytes(out) == adapter_bytes(skipped)


def test_a_run_interrupted_after_a_skip_continues_to_the_same_bytes(poisoned, skipped, tmp_path):
    out, first = tmp_path / "run", min(bad_steps(skipped))
    arguments = overrides_of(poisoned, out, "--training.on_bad_step=skip")
    run_until(first + 2, poisoned / "config.yaml", *arguments)
    assert run(poisoned / "config.yaml", *arguments) == 0
    assert adapter_bytes(out) == adapter_bytes(skipped)
    assert losses(out) == losses(skipped)


def test_too_many_bad_steps_in_a_row_end_the_run(poisoned, tmp_path, capsys):
    made = records(60)
    for record in made:
        record["conversations"][0]["value"] += f" {POISON}"
    (tmp_path / "data.json").write_text(json.dumps(made))
    arguments = overrides_of(
        poisoned,
        tmp_path / "run",
        "--training.on_bad_step=skip",
        "--training.max_bad_steps=3",
        f"--data.sources.0.path={tmp_path / 'data.json'}",
    )
    assert run(poisoned / "config.yaml", *arguments) == 1
    assert "3 bad steps in a row end the run" in capsys.readouterr().err


def test_no_example_is_named_if_the_base_or_the_learning_rate_is_bad(poisoned, tmp_path, capsys):
    """NaN in a weight that all examples use; and updates so large that the next gradient is not finite."""
    base = tmp_path / "base"
    shutil.copytree(poisoned / "base" / "model", base)
    tensors = load_file(base / "model.safetensors")
    norm = {"model.norm.weight": tensors["model.norm.weight"] * np.nan}
    save_file({**tensors, **norm}, base / "model.safetensors", {"format": "pt"})
    out = f"--output_dir={tmp_path / 'run'}"
    assert run(poisoned / "config.yaml", out, f"--model={{path: {base}, dtype: float32}}") == 1
    said = capsys.readouterr().err
    assert "error: step 1: loss nan" in said
    assert "none of its examples has a finite loss: check the base model and the learning rate" in said

    huge = ["--training.learning_rate=1e30", "--training.max_grad_norm=null"]
    assert run(poisoned / "config.yaml", f"--output_dir={tmp_path / 'other'}", *huge) == 1
    said = capsys.readouterr().err
    assert "error: step 2: loss 5." in said
    assert "each of its examples alone has a finite loss: check the learning rate" in said


def test_a_run_that_skipped_every_step_delivers_nothing(poisoned, tmp_path, capsys):
    made = records(60)
    for record in made:
        record["conversations"][0]["value"] += f" {POISON}"
    (tmp_path / "data.json").write_text(json.dumps(made))
    source = f"--data.sources.0.path={tmp_path / 'data.json'}"
    skip = ["--training.on_bad_step=skip", "--training.max_bad_steps=100", source]
    assert run(poisoned / "config.yaml", *overrides_of(poisoned, tmp_path / "run", *skip)) == 1
    said = capsys.readouterr().err
    assert "still all zeros" in said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "adapter").exists()


def test_the_batch_is_written_even_if_its_data_file_was_deleted(poisoned, skipped, tmp_path, capsys):
    """The data file is removed between tokenisation and the bad step; the tokens are still available."""
    shutil.copy(poisoned / "data.json", tmp_path / "data.json")
    source = f"--data.sources.0.path={tmp_path / 'data.json'}"
    original = training_run.starting_point

    def remove_first(*arguments):
        (tmp_path / "data.json").unlink()
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training_run, "starting_point", remove_first)
        assert run(poisoned / "config.yaml", *overrides_of(poisoned, tmp_path / "run", source)) == 1
    ((_, kept),) = bad_steps(tmp_path / "run").items()
    guilty = [example for row in kept["rows"] for example in row if example["loss"] == "nan"]
    assert guilty[0]["id"] == "the culprit"
    assert guilty[0]["record"] is None
    assert "no such file" in guilty[0]["why_not"]


def test_inspect_step_prints_the_examples_and_losses_of_any_step(poisoned, skipped, capsys):
    """Also for a good step of a finished run; nothing is written."""
    arguments = overrides_of(poisoned, skipped, "--training.on_bad_step=skip")
    step = min(bad_steps(skipped)) + 1
    before = {path: path.stat().st_mtime_ns for path in skipped.rglob("*")}
    assert run(poisoned / "config.yaml", *arguments, "--inspect_step", str(step)) == 0
    found = json.loads(capsys.readouterr().out)
    examples = [example for row in found["rows"] for example in row]
    records_of = [json.loads(line) for line in (skipped / "metrics.jsonl").read_text().splitlines()]
    (logged,) = [record for record in records_of if record["step"] == step]
    assert len(examples) == logged["examples"]
    assert sum(example["supervised_tokens"] for example in examples) == logged["supervised_tokens"]
    assert all(0 < example["loss"] < 10 for example in examples)
    assert found["losses_are_of_the_parameters_after_step"] == max(losses(skipped))
    assert {path: path.stat().st_mtime_ns for path in skipped.rglob("*")} == before
    assert run(poisoned / "config.yaml", *arguments, "--inspect_step", "9999") == 2
    assert "the run's steps are 1 to" in capsys.readouterr().err
