"""config.json in every form, against transformers."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.architecture import (
    generation_config,
    hugging_face_config,
    parse_architecture,
    read_architecture,
)
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.rope import RopeScaling
from tests.huggingface.checkpoints import ARCHITECTURES, Written
from tests.torch_models import transformers

VICUNA = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 13824,
    "max_position_embeddings": 2048,
    "model_type": "llama",
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.28.1",
    "use_cache": True,
    "vocab_size": 32000,
}


QWEN2 = {"model_type": "qwen2", "num_key_value_heads": 40, "use_sliding_window": True}
GEMMA3 = {"model_type": "gemma3_text", "num_key_value_heads": 40}


def test_unused_windows() -> None:
    qwen2 = {**VICUNA, **QWEN2, "sliding_window": 9}
    assert parse_architecture({**qwen2, "use_sliding_window": False}, "x").sliding_window is None
    assert parse_architecture({**qwen2, "max_window_layers": 40}, "x").sliding_window is None
    mistral = {**VICUNA, "model_type": "mistral", "num_key_value_heads": 8}
    assert parse_architecture({**mistral, "sliding_window": None}, "x").sliding_window is None
    assert parse_architecture(mistral, "x").sliding_window == transformers.MistralConfig().sliding_window


def test_vicuna_13b_v15_16k() -> None:
    raw = {**VICUNA, "max_position_embeddings": 4096, "max_sequence_length": 16384}
    config = parse_architecture({**raw, "rope_scaling": {"factor": 4.0, "type": "linear"}}, "config.json")
    assert (config.max_position_embeddings, config.rope_scaling) == (16384, RopeScaling("linear", 4.0))


def test_vicuna_13b() -> None:
    assert parse_architecture(VICUNA, "config.json") == LlamaConfig(
        vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_layers=40, num_heads=40, num_kv_heads=40,
        head_dim=128, rope_theta=10000.0, rms_norm_eps=1e-6, max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip


def test_what_transformers_writes_reads_back(written: Written) -> None:
    assert read_architecture(written.path) == written.config


@pytest.mark.parametrize("layout", ["transformers 4", "transformers 5"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_our_config_is_the_same_network_for_both_layouts_of_transformers(
    name: str, layout: str, tmp_path: Path
) -> None:
    config = ARCHITECTURES[name]
    raw = hugging_face_config(config, np.dtype(ml_dtypes.bfloat16), bos_token_id=1, eos_token_id=2)
    for key in {"transformers 4": ("rope_parameters", "dtype"), "transformers 5": ("rope_theta", "torch_dtype")}[
        layout
    ]:
        del raw[key]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert read_architecture(tmp_path) == config
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.num_key_value_heads == config.num_kv_heads
    assert theirs.head_dim == config.head_dim
    assert theirs.tie_word_embeddings == config.tie_word_embeddings
    assert theirs.rms_norm_eps == config.rms_norm_eps
    assert str(theirs.dtype) == "torch.bfloat16"


def test_settings_of_the_base_outside_of_the_network_are_kept() -> None:
    config = parse_architecture(VICUNA, "config.json")
    raw = hugging_face_config(config, np.dtype(np.float16), VICUNA, bos_token_id=7)
    assert {**raw, **VICUNA} == raw
    with_code = {**VICUNA, "auto_map": {"AutoModelForCausalLM": "modeling.Model"}}  # a file that is not copied
    assert hugging_face_config(config, np.dtype(np.float16), with_code, bos_token_id=7) == raw


def test_missing_sizes_get_the_conventional_defaults() -> None:
    raw = {key: VICUNA[key] for key in ("model_type", "hidden_size", "intermediate_size", "num_attention_heads")}
    raw |= {"num_hidden_layers": 2, "vocab_size": 10, "max_sequence_length": 512, "num_key_value_heads": None}
    config = parse_architecture(raw, "config.json")
    assert (config.num_kv_heads, config.head_dim, config.max_position_embeddings) == (40, 128, 512)
    assert (config.rope_theta, config.rms_norm_eps, config.tie_word_embeddings) == (10000.0, 1e-6, False)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"model_type": "gemma3"},
            "model_type is 'gemma3', which needs an image encoder; its language model alone has",
        ),
        ({**GEMMA3, "use_bidirectional_attention": True}, "attention to later tokens is not implemented"),
        ({**GEMMA3, "layer_types": ["full_attention"]}, "layer_types is not one of full_attention, sliding_attention"),
        ({**GEMMA3, "query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0, not a positive number"),
        ({**GEMMA3, "rope_parameters": {"sliding_attention": {"rope_type": "linear"}}}, "have the rope_type 'linear'"),
        ({"rope_parameters": {"full_attention": {}}}, "all layers of this model have the same rotary embedding"),
        ({"layer_types": ["sliding_attention"] * 40}, "llama has none"),
        ({"model_type": "bert"}, "model_type is 'bert'; supported are llama, mistral, ministral, qwen2, qwen3"),
        ({"model_type": "mixtral", "num_local_experts": 8}, "mixture of experts (num_local_experts 8); expert layers"),
        ({"model_type": "mistral"}, "num_key_value_heads is missing"),
        ({"model_type": "mistral", "num_key_value_heads": 8, "attention_bias": True}, "attention_bias"),
        ({"sliding_window": 9}, "sliding_window is 9"),
        ({**QWEN2, "sliding_window": 9, "max_window_layers": -3}, "max_window_layers is -3, not a whole number"),
        ({**QWEN2, "sliding_window": 0.5, "max_window_layers": 0}, "sliding_window is 0.5"),
        ({"model_type": None}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"attention_bias": 1}, "attention_bias is 1"),
        ({"rope_scaling": {"type": "linear"}}, "factor is 0.0, not a positive number"),
        ({"rope_scaling": {"type": "dynamic", "factor": -2.0}}, "factor is -2.0, not a positive number"),
        ({"hidden_act": ["silu"]}, "hidden_act is ['silu']"),
        ({"model_type": "qwen3", "num_key_value_heads": 8, "mlp_bias": True}, "mlp_bias does not apply"),
        ({"model_type": "olmo2", "sliding_window": 9}, "sliding_window is 9; olmo2 has none"),
        ({"model_type": "granite", "logits_scaling": 0}, "logits_scaling is 0, not a positive number"),
        ({"model_type": "smollm3", "num_key_value_heads": 8, "no_rope_layers": [1]}, "no_rope_layers is [1]"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
            "low_freq_factor 4 is not below high_freq_factor 4",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}}, "differ"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "short_factor is not a list of 64 numbers"),
        ({"rope_parameters": {"rope_type": "yarn", "beta_fast": -1}}, "beta_fast is -1, not a positive number"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_parameters.rope_theta is 500000.0"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"rope_scaling": 3}, "rope_scaling is 3"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"hidden_size": "5120"}, "hidden_size is '5120'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": 7}, "hidden_size 5120 is not a multiple"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads 3"),
        ({"head_dim": 5}, "head_dim 5 is odd"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'"),
    ],
)
def test_unsupported_settings_are_named(change: dict, says: str) -> None:
    with pytest.raises(UserError, match=r"somewhere/config\.json") as raised:
        parse_architecture({**VICUNA, **change}, "somewhere/config.json")
    assert says in str(raised.value)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\xff"])
def test_a_damaged_config_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"config\.json"):
        read_architecture(tmp_path)


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no config\.json"):
        read_architecture(tmp_path)


def test_generation_config_has_no_sampling_fields() -> None:
    assert generation_config(VICUNA) == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    assert generation_config({**VICUNA, "pad_token_id": -1, "temperature": 0.9}) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
