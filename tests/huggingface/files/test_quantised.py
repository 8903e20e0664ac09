"""Quantised checkpoints: rows equal those that bitsandbytes, transformers and torch dequantise."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.architecture import parse_architecture, read_architecture
from flacuna_jax.huggingface.files.read import CheckpointReader, note_on_quantisation, open_checkpoint
from flacuna_jax.huggingface.load import match_tensors
from flacuna_jax.verbs.convert import Conversion, convert_model
from tests.huggingface.checkpoints import SMALL, write
from tests.torch_models import torch, transformers

QUERY = "model.layers.1.self_attn.q_proj"


def read_as_float(reader: CheckpointReader, name: str) -> np.ndarray:
    return reader.read(name).astype(np.float32)


def quantise(directory: Path, change: Any, settings: Mapping[str, Any], dtype: str = "bfloat16") -> dict[str, Any]:
    """Writes a small model whose projections are replaced by what `change` makes of them. Returns those of torch."""
    from safetensors.torch import load_file, save_file

    write(SMALL, directory)
    state, meant = {}, {}
    for name, weight in load_file(directory / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            parts, meant[name] = change(name.removesuffix(".weight"), weight)
            state |= parts
        else:
            state[name] = weight.to(getattr(torch, dtype))
    save_file(state, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config |= {"quantization_config": dict(settings), "dtype": dtype, "torch_dtype": dtype}
    (directory / "config.json").write_text(json.dumps(config))
    return meant


def check(directory: Path, meant: Mapping[str, Any]) -> None:
    """Compares all rows, and some rows that begin and end inside of a block."""
    reader, config = open_checkpoint(directory), read_architecture(directory)
    match_tensors(reader, config)
    assert meant
    for name, weight in meant.items():
        expected = weight.float().numpy()
        np.testing.assert_array_equal(read_as_float(reader, name), expected, err_msg=name)
        assert reader.dtype(name).name == str(weight.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(reader.read(name, slice(5, 23)).astype(np.float32), expected[5:23])


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_bitsandbytes(kind: str, tmp_path: Path) -> None:
    """Rows of the last projection have 96 values, one and a half blocks."""
    functional = pytest.importorskip("bitsandbytes").functional
    from safetensors.torch import load_file

    sizes = dataclasses.replace(SMALL, hidden_size=64, intermediate_size=96, head_dim=16)
    write(sizes, tmp_path / "plain", half=True)
    settings = transformers.BitsAndBytesConfig(
        load_in_8bit=kind == "int8",
        load_in_4bit=kind != "int8",
        bnb_4bit_quant_type=kind if kind != "int8" else "fp4",
        bnb_4bit_use_double_quant=kind == "nf4",
    )
    dtype = {"nf4": torch.bfloat16, "fp4": torch.float16, "int8": torch.bfloat16}[kind]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=settings, dtype=dtype
    )
    model.save_pretrained(tmp_path / "quantised")
    stored = load_file(tmp_path / "quantised" / "model.safetensors")
    meant = {}
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        if kind == "int8":
            scales = stored[name.removesuffix("weight") + "SCB"]
            meant[name] = (stored[name].float() * scales[:, None] / 127).to(dtype)
        else:
            parts = {key.removeprefix(f"{name}."): part for key, part in stored.items() if key.startswith(f"{name}.")}
            state = functional.QuantState.from_dict(parts, torch.device("cpu"))
            # On the CPU, bitsandbytes 0.50 begins a block in every row; only rows of whole blocks come out right.
            shape, state.shape = state.shape, torch.Size([state.shape.numel() // 64, 64])
            meant[name] = functional.dequantize_4bit(stored[name], state).reshape(shape)
    if kind == "int8":  # torch and NumPy divide and multiply in another order
        reader = open_checkpoint(tmp_path / "quantised")
        for name, weight in meant.items():
            np.testing.assert_allclose(read_as_float(reader, name), weight.float().numpy(), rtol=2.0**-7)
    else:
        check(tmp_path / "quantised", meant)
    note = note_on_quantisation(tmp_path / "quantised")
    assert note is not None
    assert note.endswith(f"weights quantised by bitsandbytes are read as {str(dtype).removeprefix('torch.')}")


@pytest.mark.parametrize("size", [16, 32, 128])
def test_fp8_with_a_scale_for_each_block(size: int, tmp_path: Path) -> None:
    """32 divides neither 48 nor 112, so the last blocks are smaller; transformers then rounds scales to bfloat16."""
    transformers_fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")

    def change(name: str, weight: Any) -> Any:
        rows, columns = (-(-length // size) for length in weight.shape)
        scales = torch.rand(rows, columns) * 0.01 + 1e-3
        codes = (weight / 0.01).to(torch.float8_e4m3fn)
        if size == 32:
            scales = scales.bfloat16().float()
            meant = transformers_fp8._dequantize_fp8_weight(codes, scales, (size, size), torch.bfloat16)
        else:
            meant = transformers_fp8.Fp8Dequantize(None)._dequantize_one(codes, scales, torch.bfloat16)
        return {f"{name}.weight": codes, f"{name}.weight_scale_inv": scales}, meant

    check(tmp_path, quantise(tmp_path, change, {"quant_method": "fp8", "weight_block_size": [size, size]}))


@pytest.mark.parametrize("scales", ["channel", "matrix"])
@pytest.mark.parametrize("method", ["compressed-tensors", "fbgemm_fp8"])
def test_fp8_with_a_scale_for_each_row_or_matrix(scales: str, method: str, tmp_path: Path) -> None:
    def change(name: str, weight: Any) -> Any:
        shape = (weight.shape[0], 1) if scales == "channel" else (1,)
        scale = torch.rand(shape) * 0.01 + 1e-3
        codes = (weight / 0.01).to(torch.float8_e4m3fn)
        parts = {f"{name}.weight": codes, f"{name}.weight_scale": scale, f"{name}.input_scale": torch.ones(1)}
        return parts, (codes.float() * scale).to(torch.float16)

    settings = {"quant_method": method, "format": "float-quantized"}
    check(tmp_path, quantise(tmp_path, change, settings, "float16"))


def test_converting_writes_weights_and_settings_without_quantisation(tmp_path: Path) -> None:
    def change(name: str, weight: Any) -> Any:
        codes = (weight / 0.01).to(torch.float8_e4m3fn)
        parts = {f"{name}.weight": codes, f"{name}.weight_scale": torch.tensor(0.01)}
        return parts, (codes.float() * 0.01).to(torch.bfloat16)

    meant = quantise(tmp_path / "in", change, {"quant_method": "fbgemm_fp8"})
    said: list[str] = []
    convert_model(Conversion(str(tmp_path / "in"), str(tmp_path / "out")), said.append)
    assert any("weights quantised by fbgemm_fp8 are read as bfloat16" in line for line in said)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in settings
    reader = open_checkpoint(tmp_path / "out")
    np.testing.assert_array_equal(read_as_float(reader, f"{QUERY}.weight"), meant[f"{QUERY}.weight"].float().numpy())
    assert note_on_quantisation(tmp_path / "out") is None


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    ],
    ids=lambda settings: settings["quant_method"],
)
def test_other_methods_are_refused_by_name(settings: Mapping[str, Any], tmp_path: Path) -> None:
    write(SMALL, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": settings}
    with pytest.raises(UserError, match=rf"quantization_config is of quant_method '{settings['quant_method']}'; "):
        parse_architecture(raw, "config.json")


@pytest.mark.parametrize("fault", ["no scales", "scales of another shape", "zero points"])
def test_damaged_checkpoints(fault: str, tmp_path: Path) -> None:
    def change(name: str, weight: Any) -> Any:
        parts = {f"{name}.weight": weight.to(torch.float8_e4m3fn)}
        if fault != "no scales":
            parts[f"{name}.weight_scale"] = torch.ones(7 if fault.startswith("scales") else 1)
        if fault == "zero points":
            parts[f"{name}.weight_zero_point"] = torch.ones(1)
        return parts, weight

    quantise(tmp_path, change, {"quant_method": "fbgemm_fp8"})
    message = {"no scales": "no scales", "zero points": "zero points"}.get(fault, r"its scales have shape \[7\]")
    with pytest.raises(UserError, match=message):
        open_checkpoint(tmp_path)
