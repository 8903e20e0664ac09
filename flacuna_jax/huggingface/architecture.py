"""config.json of Hugging Face ↔ `LlamaConfig`, as transformers 4 (`rope_theta`) and 5 (`rope_parameters`) write it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.json_file import read_json
from flacuna_jax.huggingface.meta import PARAMS_FILE, is_meta, meta_settings
from flacuna_jax.model.llama import LlamaConfig

CONFIG_FILE = "config.json"

_REQUIRED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
}
"""Hugging Face key → our field, for sizes that have no sensible default."""

_UNSUPPORTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "hidden_act": (lambda value: value not in ("silu", "swish"), "only silu is implemented"),
    "attention_bias": (bool, "projections with biases are not implemented"),
    "mlp_bias": (bool, "projections with biases are not implemented"),
    "quantization_config": (bool, "the weights are quantised; start from the half-precision checkpoint"),
    "partial_rotary_factor": (lambda value: value not in (None, 1, 1.0), "partial rotary embedding is not implemented"),
    "sliding_window": (bool, "sliding-window attention is not implemented"),
}
"""Key → (does this value change the network beyond what we compute?, what to say)."""


def read_settings(directory: str | Path) -> dict[str, Any]:
    """Content of a checkpoint's config.json; for Meta's files, of the one that they stand for.

    Raises:
      UserError: there is neither config.json nor params.json, or it cannot be read.
    """
    directory = Path(directory)
    if (directory / CONFIG_FILE).is_file():
        return read_json(directory / CONFIG_FILE)
    if is_meta(directory):
        return meta_settings(directory)
    raise UserError(f"{directory} has no {CONFIG_FILE}; a checkpoint directory is expected")


def read_architecture(directory: str | Path) -> LlamaConfig:
    """Sizes of the LLaMA in a directory of Hugging Face's, Meta's or our own form.

    Raises:
      UserError: config.json is missing, incomplete, or asks for something this project does not compute.
    """
    file = PARAMS_FILE if is_meta(Path(directory)) else CONFIG_FILE
    return parse_architecture(read_settings(directory), str(Path(directory) / file))


def parse_architecture(raw: Mapping[str, Any], origin: str) -> LlamaConfig:
    """`LlamaConfig` from the content of a config.json; `origin` names it in errors."""
    if raw.get("model_type") != "llama":
        raise UserError(f"{origin}: model_type is {raw.get('model_type')!r}; only llama checkpoints can be used")
    for key, (changes, why) in _UNSUPPORTED.items():
        if key in raw and changes(raw[key]):
            raise UserError(f"{origin}: {key} is {raw[key]!r}; {why}")
    sizes = {ours: _size(raw, theirs, origin) for theirs, ours in _REQUIRED.items()}
    heads = sizes["num_heads"]
    kv_heads = _size(raw, "num_key_value_heads", origin, heads)
    if heads % kv_heads:
        raise UserError(f"{origin}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if raw.get("head_dim") is None and sizes["hidden_size"] % heads:
        raise UserError(f"{origin}: hidden_size {sizes['hidden_size']} is not a multiple of the {heads} heads")
    head_dim = _size(raw, "head_dim", origin, sizes["hidden_size"] // heads)
    if head_dim % 2:
        raise UserError(f"{origin}: head_dim {head_dim} is odd; rotary embedding turns pairs")
    # The first conversions of LLaMA called the context length max_sequence_length.
    positions = _size(raw, "max_position_embeddings", origin, _size(raw, "max_sequence_length", origin, 2048))
    return LlamaConfig(
        **sizes,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=_rope_theta(raw, origin),
        rms_norm_eps=_number(raw, "rms_norm_eps", origin, 1e-6),
        max_position_embeddings=positions,
        tie_word_embeddings=_flag(raw, "tie_word_embeddings", origin),
    )


def _size(raw: Mapping[str, Any], key: str, origin: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    if type(value) is not int or value <= 0:
        what = "is missing" if value is None else f"is {value!r}, not a positive whole number"
        raise UserError(f"{origin}: {key} {what}")
    return value


def _number(raw: Mapping[str, Any], key: str, origin: str, default: float) -> float:
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise UserError(f"{origin}: {key} is {value!r}, not a positive number")
    return float(value)


def _flag(raw: Mapping[str, Any], key: str, origin: str) -> bool:
    value = raw.get(key, False)
    if not isinstance(value, bool):
        raise UserError(f"{origin}: {key} is {value!r}, not true or false")
    return value


def _rope_theta(raw: Mapping[str, Any], origin: str) -> float:
    """The rotary base; any scaling of positions or frequencies is refused, because it would silently be left out."""
    for key in ("rope_scaling", "rope_parameters"):
        rope = raw.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise UserError(f"{origin}: {key} is {rope!r}, not an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise UserError(f"{origin}: {key} asks for {kind!r}; scaled rotary embedding is not implemented")
        if rope.get("partial_rotary_factor", 1) != 1:
            raise UserError(f"{origin}: {key} asks for a partial rotary embedding, which is not implemented")
    nested = (raw.get("rope_parameters") or {}).get("rope_theta")
    flat = raw.get("rope_theta")
    if nested is not None and flat is not None and nested != flat:
        raise UserError(f"{origin}: rope_theta is {flat!r}, but rope_parameters.rope_theta is {nested!r}")
    theta = nested if nested is not None else flat
    return _number({} if theta is None else {"rope_theta": theta}, "rope_theta", origin, 10000.0)


def hugging_face_config(
    config: LlamaConfig, dtype: np.dtype, source: Mapping[str, Any] | None = None, **token_ids: int | None
) -> dict[str, Any]:
    """Content of a config.json that transformers 4 and 5 both read as the same network.

    Args:
      config: sizes.
      dtype: dtype of the stored weights.
      source: the base's config.json; what it says beyond the network (token ids, initializer_range) is kept.
      token_ids: bos_token_id, eos_token_id, pad_token_id where the source does not state them.
    """
    written = dict(source or {"use_cache": True, "initializer_range": 0.02, "pretraining_tp": 1})
    return (token_ids | written) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "torch_dtype": dtype.name,
        "dtype": dtype.name,
    }


def generation_config(written: Mapping[str, Any]) -> dict[str, Any]:
    """Content of a generation_config.json: token ids alone.

    Sampling fields without `do_sample` (as old LLaMA and Vicuna files have them) make transformers refuse to save.
    """
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {key: written[key] for key in keys if written.get(key) is not None and written[key] != -1}
