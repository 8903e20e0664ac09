"""GGUF files read as checkpoints: the package gguf writes the files and dequantises the blocks that ours are compared
with."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.architecture import parse_architecture, read_architecture
from flacuna_jax.huggingface.files.place import local_checkpoint
from flacuna_jax.huggingface.files.read import note_on_quantisation, open_checkpoint
from flacuna_jax.huggingface.files.tensors import MappedFiles, StoredTensor
from flacuna_jax.huggingface.gguf.header import Header, TensorInfo, read_header
from flacuna_jax.huggingface.gguf.settings import rope_divisors, settings_of
from flacuna_jax.huggingface.gguf.tensors import GGUFTensor
from flacuna_jax.huggingface.load import match_tensors
from flacuna_jax.model.rope import RopeScaling
from tests.hub_server import Hub
from tests.huggingface.gguf.files import SIZES, gguf, llama_metadata, llama_tensors, permuted, write

PACKED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL")


def random_blocks(kind: str, rows: int, columns: int) -> np.ndarray:
    """Bytes of random blocks, with scales that are finite float16 numbers."""
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return np.random.default_rng(0).integers(0, 0x3C, (rows, columns // values * size), dtype=np.uint8)


@pytest.mark.parametrize("kind", PACKED)
def test_rows_of_packed_tensors(kind: str, tmp_path: Path) -> None:
    packed = random_blocks(kind, 24, 512)
    path = write(tmp_path / "x.gguf", {}, {"a": np.zeros(3, np.float32), "w": packed}, {"w": kind})
    tensor = GGUFTensor(read_header(path).tensors["w"])
    expected = gguf.dequantize(packed, gguf.GGMLQuantizationType[kind])
    assert (tensor.shape, tensor.dtype) == ((24, 512), np.float32)
    np.testing.assert_array_equal(tensor.read(MappedFiles()), expected)
    np.testing.assert_array_equal(tensor.read(MappedFiles(), slice(5, 19)), expected[5:19])
    heads = GGUFTensor(read_header(path).tensors["w"], head_dim=8)
    np.testing.assert_array_equal(permuted(heads.read(MappedFiles()), 3), expected)
    np.testing.assert_array_equal(heads.read(MappedFiles(), slice(5, 19)), heads.read(MappedFiles())[5:19])


def test_a_file_is_a_checkpoint(tmp_path: Path) -> None:
    tensors = llama_tensors()
    tensors["blk.0.attn_q.weight"] = permuted(tensors["blk.0.attn_q.weight"], 4).astype(np.float16)
    path = write(tmp_path / "x.gguf", llama_metadata(**{"tokenizer.chat_template": "{{ messages }}"}), tensors)
    for place in (path, tmp_path):  # a directory with one file stands for the file
        directory = local_checkpoint(place)
        config, reader = read_architecture(place), open_checkpoint(place)
        match_tensors(reader, config)
        assert (config.vocab_size, config.num_layers, config.head_dim, config.tie_word_embeddings) == (6, 2, 8, True)
        assert config.rms_norm_eps == 1e-5, "not the number rounded to float32"
        found = reader.read("model.layers.0.self_attn.q_proj.weight")
        assert found.dtype == np.float16
        np.testing.assert_array_equal(permuted(found, 4), tensors["blk.0.attn_q.weight"])
        np.testing.assert_array_equal(reader.read("model.norm.weight"), tensors["output_norm.weight"])
        assert json.loads((directory / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"
        assert note_on_quantisation(place) is None
    assert local_checkpoint(path) == local_checkpoint(path), "it is unpacked once"


def test_a_file_in_parts(tmp_path: Path) -> None:
    tensors = llama_tensors()
    names = list(tensors)
    for part, chosen in enumerate((names[:7], names[7:])):
        metadata = llama_metadata() if part == 0 else {}
        write(tmp_path / f"x-{part + 1:05}-of-00002.gguf", metadata, {name: tensors[name] for name in chosen})
    for place in (tmp_path, tmp_path / "x-00001-of-00002.gguf"):
        match_tensors(open_checkpoint(place), read_architecture(place))
    (tmp_path / "x-00002-of-00002.gguf").unlink()
    with pytest.raises(UserError, match=r"x-00002-of-00002\.gguf is missing"):
        open_checkpoint(tmp_path)


SCALING = {
    "linear": ({"type": "linear", "factor": 4.0}, RopeScaling("linear", 4.0)),
    "yarn": (
        {"type": "yarn", "factor": 4.0, "original_context_length": 32, "attn_factor": 1.0},
        RopeScaling("yarn", 4.0, original_max_position_embeddings=32, attention_factor=0.1 * np.log(4) + 1),
    ),
}


@pytest.mark.parametrize("kind", [*SCALING, "llama3"])
def test_rope_scaling(kind: str, tmp_path: Path) -> None:
    """Llama 3's is a tensor of divisors."""
    tensors = llama_tensors()
    if kind == "llama3":
        metadata, meant = {}, RopeScaling("llama3", 8.0, original_max_position_embeddings=128)
        tensors["rope_freqs.weight"] = rope_divisors(8, 10000.0, meant).astype(np.float32)
        assert 1 < tensors["rope_freqs.weight"][1] < 8, "one of the frequencies is interpolated"
    else:
        given, meant = SCALING[kind]
        metadata = {f"llama.rope.scaling.{key}": value for key, value in given.items()}
    path = write(tmp_path / "x.gguf", llama_metadata(**metadata), tensors)
    assert read_architecture(path).rope_scaling == meant
    match_tensors(open_checkpoint(path), read_architecture(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"llama.expert_count": 8}, r"the setting expert_count \(8\) is not implemented"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "only linear and yarn"),
        (
            {"llama.rope.dimension_count": 4, "llama.attention.key_length": 8},
            "rope.dimension_count is 4, but heads have",
        ),
        ({"llama.block_count": None}, "num_hidden_layers is missing"),
        ({"llama.attention.head_count_kv": [2, 1]}, "attention.head_count_kv differs between layers"),
        ({"tokenizer.ggml.model": "t5"}, "its tokenizer is 't5'; supported are gpt2 and llama"),
        ({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "new"}, "tokenizer.ggml.pre is 'new', an unknown way"),
        ({"tokenizer.ggml.scores": None}, "has no score for each of its 6 tokens"),
        ({"tokenizer.ggml.eos_token_id": 6}, "eos_token_id is 6, but there are 6 tokens"),
        ({"tokenizer.ggml.tokens": ["a"] * 6}, "its tokens are not distinct"),
    ],
)
def test_what_is_not_implemented_is_named(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", llama_metadata(**changes), llama_tensors())
    with pytest.raises(UserError, match=rf"x\.gguf.*{message}"):
        local_checkpoint(path)


def gemma(name: str, layers: int = 6, **changes: Any) -> Header:
    """The header of a Gemma without its other tensors."""
    sizes = {**SIZES, "attention.key_length": 16, "rope.dimension_count": 16, "attention.sliding_window": 128}
    sizes |= {"block_count": layers, **changes}
    metadata = {f"{name}.{key}": value for key, value in sizes.items() if value is not None}
    place = StoredTensor(Path("x.gguf"), 0, (6, 32), np.dtype(np.float32))
    tensors = {"token_embd.weight": TensorInfo((6, 32), "F32", place)}
    return Header(Path("x.gguf"), {"general.architecture": name, **metadata}, tensors)


@pytest.mark.parametrize(
    ("header", "window", "layers"),
    [
        (gemma("gemma3", 7), 128, (0, 1, 2, 3, 4, 6)),
        (gemma("gemma2"), 128, (0, 2, 4)),
        (gemma("gemma2", **{"attention.sliding_window": None}), 4096, (0, 2, 4)),
        (gemma("gemma3", **{"attention.sliding_window": None}), None, None),
        (gemma("gemma3", **{"attention.sliding_window": 0}), None, None),
        (gemma("gemma3", **{"attention.sliding_window_pattern": 3}), 128, (0, 1, 3, 4)),
        (gemma("gemma3", 3, **{"attention.sliding_window_pattern": [False, True, False]}), 128, (1,)),
    ],
)
def test_layers_with_a_window(header: Header, window: int | None, layers: tuple[int, ...] | None) -> None:
    """llama.cpp's defaults count for keys that a file lacks."""
    config = parse_architecture(settings_of(header), "config")
    assert (config.sliding_window, config.windowed_layers) == (window, layers)


@pytest.mark.parametrize(("name", "layers", "scalar"), [("gemma2", 42, 16), ("gemma2", 46, 8), ("gemma3", 62, 8)])
def test_scores_of_the_largest_gemma_are_scaled_by_its_width(name: str, layers: int, scalar: int) -> None:
    assert parse_architecture(settings_of(gemma(name, layers)), "config").attention_multiplier == scalar**-0.5


def test_an_attn_factor_of_olmo3_is_refused() -> None:
    """llama.cpp's converter writes the whole factor, and llama.cpp multiplies it by YaRN's."""
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.attn_factor": 1.2079442}
    header = gemma("olmo2", **{"rope.scaling.original_context_length": 16, **yarn})
    with pytest.raises(
        UserError, match=r"x\.gguf: rope\.scaling\.attn_factor is 1\.20794; llama\.cpp and its converter"
    ):
        settings_of(header)


def test_longrope_needs_both_tensors(tmp_path: Path) -> None:
    metadata = {key.replace("llama.", "phi3."): value for key, value in llama_metadata().items()}
    tensors = llama_tensors() | {"rope_factors_long.weight": np.ones(4, np.float32)}
    with pytest.raises(UserError, match=r"x\.gguf has no tensor rope_factors_short\.weight"):
        local_checkpoint(write(tmp_path / "x.gguf", metadata, tensors, None, "phi3"))


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", {"mamba.block_count": 2}, {"token_embd.weight": np.zeros((2, 2))}, None, "mamba")
    with pytest.raises(UserError, match="the architecture is 'mamba'; supported are llama, qwen2"):
        local_checkpoint(path)


def test_unknown_tensors_are_reported(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", llama_metadata(), llama_tensors() | {"blk.0.ssm_a": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match=r"1 not in the model: blk\.0\.ssm_a"):
        match_tensors(open_checkpoint(path), read_architecture(path))


@pytest.mark.parametrize("size", [3, 100, -100, -1])
def test_torn_files(size: int, tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", llama_metadata(), llama_tensors())
    content = path.read_bytes()
    path.write_bytes(content[:size])
    with pytest.raises(UserError, match="torn"):
        local_checkpoint(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    for content, message in (
        (b"GGML" + bytes(100), "does not begin with GGUF"),
        (b"GGUF\x01\0\0\0" + bytes(100), "GGUF of version 1"),
        (b"GGUF\0\0\0\x03" + bytes(100), "big-endian"),
        (b"", "x.gguf is empty; download or copy it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 13\n", "Git LFS pointer"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            local_checkpoint(path)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.gguf", llama_metadata(), llama_tensors())
    monkeypatch.setenv("FLACUNA_CACHE", str(path))
    with pytest.raises(UserError, match=r"cannot be unpacked to .* \(Not a directory\); set FLACUNA_CACHE"):
        local_checkpoint(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.gguf does not exist"):
        open_checkpoint(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("files", "given", "found"),
    [
        (["m.gguf"], "", "m"),
        (["m-Q8_0.gguf", "m-F16.gguf"], ":m-F16.gguf", "m-F16"),
        (["m-Q8_0.gguf", "m.F16.gguf", "model.safetensors"], "@main:f16", "m.F16"),
    ],
)
def test_files_of_the_hub(files: list[str], given: str, found: str, hub: Hub, tmp_path: Path) -> None:
    content = write(tmp_path / "x.gguf", llama_metadata(), llama_tensors()).read_bytes()
    hub.add("o/n", {"config.json": b"of another form", **dict.fromkeys(files, content)})
    directory = local_checkpoint(f"hf:o/n{given}", weights=False)
    assert directory.name == found
    assert len([name for name in hub.downloaded() if name.endswith(".gguf")]) == 1
    assert read_architecture(directory).hidden_size == 32
    assert "model.layers.1.self_attn.q_proj.weight" in open_checkpoint(f"hf:o/n{given}")


@pytest.mark.parametrize(
    ("files", "given", "message"),
    [
        (["m-q8_0.gguf", "m-f16.gguf"], "", "has 2 GGUF files that may be meant; write hf:o/n:FILE with one of: m-f16"),
        (["m-q8_0.gguf"], ":q4_0", "hf:o/n:q4_0: the repository has no GGUF file q4_0; .* one of: m-q8_0.gguf"),
        (["model.safetensors"], ":q4_0", "the repository has no GGUF files; write hf:o/n$"),
        ([], "", "hf:o/n has no weights of a model or an adapter"),
    ],
)
def test_files_of_the_hub_that_are_not_clear(files: list[str], given: str, message: str, hub: Hub) -> None:
    hub.add("o/n", {"config.json": b"{}", **dict.fromkeys(files, b"x")})
    with pytest.raises(UserError, match=message):
        local_checkpoint(f"hf:o/n{given}")


def test_several_files_in_a_directory(tmp_path: Path) -> None:
    for name in "ab":
        write(tmp_path / f"{name}.gguf", llama_metadata(), llama_tensors())
    with pytest.raises(UserError, match=r"several GGUF files; give one of them: a\.gguf, b\.gguf"):
        local_checkpoint(tmp_path)
