"""Models in GGUF files against transformers: files as llama.cpp's converter writes them are read, ours are reopened.

float32 on both sides, sums in other orders: logits are O(1) and agree to 1e-4.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flacuna_jax import check, export
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.architecture import parse_architecture, read_architecture
from flacuna_jax.huggingface.files.read import open_checkpoint
from flacuna_jax.huggingface.gguf.architectures import architecture_of
from flacuna_jax.huggingface.gguf.settings import metadata_of
from flacuna_jax.huggingface.probe import probe_ids, stored_weights, streamed_logits
from tests.huggingface.gguf.files import TOKENIZER, gguf, permuted, write
from tests.torch_models import torch, transformers

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "attn_implementation": "eager",
}
GRANITE = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.25,
    "logits_scaling": 8.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.7}
FAMILY = {
    "llama": ("Llama", {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
    "llama, tied, linear": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LINEAR}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "yarn": ("Llama", {"rope_parameters": YARN}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"head_dim": 32, "sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "olmo2": ("Olmo2", {}),
    "granite": ("Granite", GRANITE),
    "smollm3": ("SmolLM3", {"pad_token_id": None}),
}
READ_BY_TRANSFORMERS = ("llama", "qwen2")
PERMUTED = ("Llama", "Mistral", "Granite", "SmolLM3")


def model_of(member: str) -> Any:
    kind, changes = FAMILY[member]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES | changes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval().float()
    for name, parameter in model.named_parameters():  # neither ones nor zeros
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, 1.0 if "norm" in name else 0.0, 0.2)
    return model


def logits_of(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(ids.astype(np.int64))[None]).logits[0].numpy()


def as_llama_cpp_writes_it(path: Path, model: Any, kind: str) -> None:
    """The weights by the names of the package gguf, with the rows of q and k in llama.cpp's order."""
    config = parse_architecture(model.config.to_dict(), "config")
    architecture = architecture_of(config)
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture.name)
    table = gguf.get_tensor_name_map(number, config.num_layers)
    tensors = {}
    for name, tensor in model.state_dict().items():
        value = tensor.numpy()
        if kind in PERMUTED and ".self_attn.q_proj" in name:
            value = permuted(value, config.num_heads)
        if kind in PERMUTED and ".self_attn.k_proj" in name:
            value = permuted(value, config.num_kv_heads)
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            tensors[table.get_name(name, try_suffixes=(".weight", ".bias"))] = value
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        plain = 5e5 ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
        scaled = model.model.rotary_emb.inv_freq.numpy()
        tensors["rope_freqs.weight"] = (plain / scaled).astype(np.float32)
    vocabulary = TOKENIZER | {
        "tokenizer.ggml.tokens": [f"token{number}" for number in range(97)],
        "tokenizer.ggml.scores": [0.0] * 97,
        "tokenizer.ggml.token_type": [2, 3, 3, *[1] * 94],
    }
    write(path, metadata_of(config, architecture) | vocabulary, tensors, None, architecture.name)


@pytest.mark.parametrize("member", FAMILY)
def test_logits_of_files_by_llama_cpp(member: str, tmp_path: Path) -> None:
    model = model_of(member)
    as_llama_cpp_writes_it(tmp_path / "x.gguf", model, FAMILY[member][0])
    config = read_architecture(tmp_path / "x.gguf")
    ids = probe_ids(config)
    ours = streamed_logits(stored_weights(open_checkpoint(tmp_path / "x.gguf"), config), config, ids, None)
    np.testing.assert_allclose(ours, logits_of(model, ids), atol=1e-4)
    if member in READ_BY_TRANSFORMERS:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32)
        np.testing.assert_allclose(ours, logits_of(theirs, ids), atol=1e-4)


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_an_exported_model_in_transformers(kind: str, story_llama: Path, tmp_path: Path) -> None:
    """The values of the file are the model's to half a step of the type, which the export verifies; here transformers
    reads the same values, names and ids from it."""
    said: list[str] = []
    given = {"run": None, "out": str(tmp_path / "out"), "format": "gguf", "model": str(story_llama), "gguf_type": kind}
    export.export_run(export.Export(**given, golden_tokens=int(kind == "f16")), said.append)
    assert any("read back and verified" in line for line in said)
    if kind == "f16":
        assert check.main([str(tmp_path / "out")]) == 0
    config = read_architecture(tmp_path / "out")
    ids = probe_ids(config)
    ours = streamed_logits(stored_weights(open_checkpoint(tmp_path / "out"), config), config, ids, None)
    path = tmp_path / "out"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, gguf_file="model.gguf", dtype=torch.float32)
    np.testing.assert_allclose(ours, logits_of(theirs, ids), atol=1e-4 * ours.std())
    plain = transformers.AutoTokenizer.from_pretrained(story_llama)
    found = transformers.AutoTokenizer.from_pretrained(path, gguf_file="model.gguf")
    for text in ("Once upon a time, there was a little girl.", "naïve 東京 12345"):
        assert found(text)["input_ids"] == plain(text)["input_ids"]
    modelfile = (path / "Modelfile").read_text()
    assert modelfile.startswith("FROM ./model.gguf\n")
    assert f'PARAMETER stop "{plain.eos_token}"' in modelfile


def test_an_exported_adapter_is_merged(story_llama: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    base = transformers.AutoModelForCausalLM.from_pretrained(story_llama, dtype=torch.float32)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    request = export.Export(
        None,
        str(tmp_path / "out"),
        "gguf",
        model=str(story_llama),
        adapter=str(tmp_path / "adapter"),
        gguf_type="bf16",
        golden_tokens=0,
    )
    export.export_run(request)
    reopened = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32
    )
    merged = adapted.merge_and_unload()
    for name, weight in merged.state_dict().items():
        found = reopened.state_dict()[name]
        assert torch.equal(found, weight.bfloat16().float() if weight.ndim == 2 else weight), name


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ({"hidden_act": "gelu"}, "cannot express hidden_act 'gelu'"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "cannot express rope scaling",
        ),
    ],
)
def test_what_gguf_cannot_express(member: dict[str, Any], message: str) -> None:
    config = parse_architecture(transformers.LlamaConfig(**SIZES | member).to_dict(), "config")
    with pytest.raises(UserError, match=message):
        metadata_of(config, architecture_of(config))


def test_options_that_do_not_apply(story_llama: Path, tmp_path: Path) -> None:
    given = {"run": None, "out": str(tmp_path / "out"), "model": str(story_llama)}
    for options, message in (
        ({"format": "gguf", "dtype": "float16"}, "--dtype float16: the type of the matrices .* --gguf-type"),
        ({"format": "merged", "gguf_type": "f16"}, "--gguf-type applies to --format gguf only"),
    ):
        with pytest.raises(UserError, match=message):
            export.export_run(export.Export(**given | options))
