"""Common faults of checkpoints on disk: the message names each, and what to do."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.architecture import parse_architecture, read_architecture
from flacuna_jax.huggingface.files.read import open_checkpoint
from flacuna_jax.huggingface.files.tensors import overflow
from flacuna_jax.huggingface.load import match_tensors
from flacuna_jax.huggingface.tokenizer import load_tokenizer

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 13476839424\n"


@pytest.fixture
def checkpoint(story_llama: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "story"
    shutil.copytree(story_llama, directory)
    for path in (directory, *directory.iterdir()):
        path.chmod(0o755)
    return directory


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "pytorch_model.bin", "tokenizer.json"])
def test_git_lfs_pointers(checkpoint: Path, name: str) -> None:
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    (checkpoint / name).write_text(POINTER)
    read = {"config.json": read_architecture, "tokenizer.json": load_tokenizer}.get(name, open_checkpoint)
    with pytest.raises(UserError, match=rf"{name}: this is a Git LFS pointer, not the file of 13,476,839,424 bytes"):
        read(checkpoint)


def test_a_byte_order_mark_in_config_json(checkpoint: Path) -> None:
    expected = read_architecture(checkpoint)
    path = checkpoint / "config.json"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert read_architecture(checkpoint) == expected


def test_a_directory_of_the_hub_cache_is_opened_at_its_snapshot(checkpoint: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--o--n" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    checkpoint.rename(snapshot)
    assert read_architecture(tmp_path / "models--o--n") == read_architecture(snapshot)
    assert open_checkpoint(tmp_path / "models--o--n").directory == snapshot


def test_buffers_of_rotary_embedding_are_ignored(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    for name in ("inv_freq", "cos_cached", "sin_cached"):
        tensors[f"model.layers.0.self_attn.rotary_emb.{name}"] = np.zeros(4, np.float32)
    save_file(tensors, checkpoint / "model.safetensors")
    match_tensors(open_checkpoint(checkpoint), read_architecture(checkpoint))


def test_quantised_weights(checkpoint: Path) -> None:
    raw = json.loads((checkpoint / "config.json").read_text())
    with pytest.raises(UserError, match=r"quantization_config is of quant_method 'gptq'; the weights are quantised"):
        parse_architecture(raw | {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "config.json")
    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    tensors[f"{name}.qweight"] = tensors.pop(f"{name}.weight").view(np.int32)
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(UserError, match=r"the weights are quantised, but config.json does not say how"):
        match_tensors(open_checkpoint(checkpoint), read_architecture(checkpoint))


def test_weights_in_fp8_without_scales(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(ml_dtypes.float8_e4m3fn)
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(
        UserError, match=r"has dtype float8_e4m3fn; weights must be floating-point, of at least 16 bits"
    ):
        match_tensors(open_checkpoint(checkpoint), read_architecture(checkpoint))


def test_float16_overflow_is_not_reported_as_damage() -> None:
    assert "largest number is 65504" in overflow(np.array([70000.0], np.float32).astype(np.float16))
    assert overflow(np.array([np.nan], np.float16)) == overflow(np.array([np.inf], np.float32)) == ""
