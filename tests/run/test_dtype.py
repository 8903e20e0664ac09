"""A run with `model.dtype: auto`: it prints what was chosen and why, keeps it, and refuses another one."""

import pytest
import yaml

from flacuna_jax import train
from flacuna_jax.cli import run_verb
from flacuna_jax.planning import compute_dtype
from tests.small_run import write_run


def test_the_dtype_is_printed_written_and_kept(tmp_path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("FLACUNA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compute_dtype, "relative_speed", lambda: 1.9)
    config = write_run(tmp_path, 10, model={"dtype": "auto"}, training={"max_steps": 1})

    def run(*overrides):
        return run_verb(train.main, ["--config", str(config), *overrides])

    assert run() == 0
    said = "dtype      bfloat16 (auto: this processor multiplies bfloat16 1.9 × as fast as float32)"
    assert said in capsys.readouterr().out.splitlines()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"]["dtype"] == "bfloat16"

    # The same run on a machine that would choose the other dtype.
    monkeypatch.setenv("FLACUNA_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(compute_dtype, "relative_speed", lambda: 0.5)
    assert run() == 0
    assert "dtype      bfloat16 (auto: as this run began)" in capsys.readouterr().out.splitlines()
    assert run("--model.dtype=float32") == 2
    assert "model.dtype: bfloat16 in the checkpoint, float32 now" in capsys.readouterr().err
    # Without the file with its settings, the choice is made again, and compared with the checkpoint.
    (tmp_path / "run" / "config.yaml").unlink()
    assert run() == 2
    assert "model.dtype: bfloat16 in the checkpoint, float32 now" in capsys.readouterr().err
