"""`flacuna convert` from the command line: exit status, message, files on the disk."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from flacuna_jax import convert
from flacuna_jax.cli import run_verb
from flacuna_jax.huggingface.files.read import open_checkpoint
from flacuna_jax.huggingface.load import fingerprint, read_architecture


def test_a_trained_model_converts(story_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "native"
    assert run_verb(convert.main, [str(story_llama), str(out)]) == 0
    assert "read back and verified" in capsys.readouterr().out
    config = read_architecture(story_llama)
    assert fingerprint(open_checkpoint(out), config) == fingerprint(open_checkpoint(story_llama), config)
    assert (out / "tokenizer.json").read_bytes() == (story_llama / "tokenizer.json").read_bytes()


def test_another_dtype(story_llama: Path, tmp_path: Path) -> None:
    assert run_verb(convert.main, [str(story_llama), str(tmp_path / "out"), "--dtype", "float16"]) == 0
    reader = open_checkpoint(tmp_path / "out")
    assert {reader.dtype(name) for name in reader} == {np.dtype(np.float16)}


@pytest.fixture
def copy(story_llama: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model"
    shutil.copytree(story_llama, path)
    for file in path.iterdir():
        file.chmod(0o644)
    return path


def truncate(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def wrong_config(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))


def small_vocabulary(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"vocab_size": 2000}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, "torn"),
        (wrong_config, "9 missing"),
        (small_vocabulary, "2048 tokens, but the model's embedding 2000"),
        (lambda path: (path / "config.json").unlink(), "has no config.json"),
        (lambda path: (path / "tokenizer.json").write_text("{}"), "tokenizer.json is not a tokenizer"),
        (shutil.rmtree, "is not a directory"),
    ],
    ids=["torn", "layers", "vocabulary", "no config", "tokenizer", "nothing"],
)
def test_bad_input_exits_2_and_writes_nothing(
    damage: object, says: str, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(copy)
    assert run_verb(convert.main, [str(copy), str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} <= {"model"}


def test_an_existing_target_is_not_changed(story_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    assert run_verb(convert.main, [str(story_llama), str(tmp_path)]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]
