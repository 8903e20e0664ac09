"""Models in GGUF files against transformers: files as llama.cpp's converter writes them are read, ours are reopened.

float32 on both sides, sums in other orders: logits are O(1) and agree to 1e-4.
"""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flacuna_jax import Export, check, export_run
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.architecture import parse_architecture, read_architecture
from flacuna_jax.huggingface.files.read import open_checkpoint
from flacuna_jax.huggingface.gguf.architectures import architecture_of
from flacuna_jax.huggingface.gguf.settings import metadata_of
from flacuna_jax.huggingface.probe import probe_ids, stored_weights, streamed_logits
from tests.huggingface.gguf.files import TOKENIZER, gguf, permuted, write
from tests.torch_models import LLAMA3, YARN, torch, transformers

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
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.7}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.5, 4.1],
    "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0],
    "original_max_position_embeddings": 64,
}
BY_LAYER_TYPE = {
    "full_attention": YARN,
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
PHI3 = {"pad_token_id": None, "sliding_window": None}
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
    "olmo3": ("Olmo3", {"sliding_window": 4, "rope_parameters": BY_LAYER_TYPE}),
    "gemma2": ("Gemma2", {"head_dim": 256, "sliding_window": 4}),
    "gemma3": ("Gemma3", {"head_dim": 256, "sliding_window": 4, "num_hidden_layers": 7}),
    "phi3": ("Phi3", PHI3),
    "phi3, window": ("Phi3", {**PHI3, "sliding_window": 4}),
    "longrope": ("Phi3", {**PHI3, "original_max_position_embeddings": 64, "rope_parameters": LONGROPE}),
}
READ_BY_TRANSFORMERS = ("llama", "qwen2", "gemma2", "gemma3", "phi3")
PERMUTED = ("Llama", "Mistral", "Granite", "SmolLM3")


def model_of(member: str, **sizes: int) -> Any:
    kind, changes = FAMILY[member]
    torch.manual_seed(0)
    config = getattr(transformers, "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config")(
        **SIZES | changes | sizes
    )
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
        if "Gemma" in kind and "norm" in name:
            value = value + 1
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            tensors[table.get_name(name, try_suffixes=(".weight", ".bias"))] = value
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        plain = 5e5 ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
        scaled = model.model.rotary_emb.inv_freq.numpy()
        tensors["rope_freqs.weight"] = (plain / scaled).astype(np.float32)
    if config.rope_scaling is not None and config.rope_scaling.kind == "longrope":
        for key in ("short", "long"):
            tensors[f"rope_factors_{key}.weight"] = np.array(LONGROPE[f"{key}_factor"], np.float32)
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
        np.testing.assert_allclose(ours, logits_of(reopened(tmp_path / "x.gguf"), ids), atol=1e-4)


def reopened(path: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager", pad_token_id=0
    )


SLOW = [pytest.param(member, marks=pytest.mark.slow) for member in ("gemma2", "phi3", "olmo3")]


@pytest.mark.parametrize("member", ["gemma3", "longrope", *SLOW])
def test_exports_of_further_families(member: str, story_llama: Path, tmp_path: Path) -> None:
    """All values are bfloat16 numbers, so that the export rounds nothing."""
    source, out = tmp_path / "source", tmp_path / "out"
    model = model_of(member, vocab_size=read_architecture(story_llama).vocab_size)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    model.save_pretrained(source)
    for file in story_llama.glob("*token*"):
        shutil.copyfile(file, source / file.name)
    export_run(Export(None, str(out), "gguf", model=str(source), gguf_type="bf16", golden_tokens=0))
    config = read_architecture(out)
    assert config == dataclasses.replace(read_architecture(source), rope_scaling=config.rope_scaling)
    ids, expected = probe_ids(config), logits_of(model, probe_ids(config))
    ours = streamed_logits(stored_weights(open_checkpoint(out), config), config, ids, None)
    np.testing.assert_allclose(ours, expected, atol=1e-4 * expected.std())
    if member in READ_BY_TRANSFORMERS:
        theirs = reopened(out / "model.gguf")
        np.testing.assert_allclose(logits_of(theirs, ids), expected, atol=1e-4 * expected.std())


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_an_exported_model_in_transformers(kind: str, story_llama: Path, tmp_path: Path) -> None:
    """The values of the file are the model's to half a step of the type, which the export verifies; here transformers
    reads the same values, names and ids from it."""
    said: list[str] = []
    given = {"run": None, "out": str(tmp_path / "out"), "format": "gguf", "model": str(story_llama), "gguf_type": kind}
    export_run(Export(**given, golden_tokens=int(kind == "f16")), said.append)
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
    request = Export(
        None,
        str(tmp_path / "out"),
        "gguf",
        model=str(story_llama),
        adapter=str(tmp_path / "adapter"),
        gguf_type="bf16",
        golden_tokens=0,
    )
    export_run(request)
    reopened = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32
    )
    merged = adapted.merge_and_unload()
    for name, weight in merged.state_dict().items():
        found = reopened.state_dict()[name]
        assert torch.equal(found, weight.bfloat16().float() if weight.ndim == 2 else weight), name


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "architecture llama cannot express hidden_act 'gelu'"),
        ("llama", {"rope_parameters": DYNAMIC}, "cannot express rope scaling"),
        ("gemma2", {"query_pre_attn_scalar": 100}, "architecture gemma2 cannot express query_pre_attn_scalar 100"),
        ("gemma2", {"attn_logit_softcapping": None}, "architecture gemma2 cannot express attn_logit_softcapping None"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "gemma3 cannot express attn_logit_softcapping 50.0"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 4}, "architecture gemma3 cannot express layer_types"),
        ("ministral", {}, "GGUF of model_type 'ministral' is not implemented"),
    ],
)
def test_what_gguf_cannot_express(family: str, settings: dict[str, Any], message: str) -> None:
    config = parse_architecture({"model_type": family, **SIZES, **settings}, "config")
    with pytest.raises(UserError, match=message):
        metadata_of(config, architecture_of(config))


def test_options_that_do_not_apply(story_llama: Path, tmp_path: Path) -> None:
    given = {"run": None, "out": str(tmp_path / "out"), "model": str(story_llama)}
    for options, message in (
        ({"format": "gguf", "dtype": "float16"}, "--dtype float16: the type of the matrices .* --gguf-type"),
        ({"format": "merged", "gguf_type": "f16"}, "--gguf-type applies to --format gguf only"),
    ):
        with pytest.raises(UserError, match=message):
            export_run(Export(**given | options))
