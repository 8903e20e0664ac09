"""Converts between `LlamaConfig` and config.json of transformers 4 (`rope_theta`) and 5 (`rope_parameters`)."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.files.json_file import read_json
from flacuna_jax.huggingface.files.meta import PARAMS_FILE, is_meta, meta_settings
from flacuna_jax.huggingface.files.place import local_checkpoint, require_directory
from flacuna_jax.huggingface.files.quantised import KEY as QUANTISATION
from flacuna_jax.huggingface.files.quantised import method_of
from flacuna_jax.model.llama import Family, LlamaConfig
from flacuna_jax.model.rope import RopeScaling

CONFIG_FILE = "config.json"

_REQUIRED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
}
"""Hugging Face key → our field, for sizes that have no sensible default."""

_ACTIVATIONS: dict[str, Literal["silu", "gelu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
"""Hugging Face's name → ours; written with the first of the names."""

_UNSUPPORTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "hidden_act": (lambda value: value not in tuple(_ACTIVATIONS), "only silu and gelu are implemented"),
    QUANTISATION: (
        lambda value: bool(value) and method_of({QUANTISATION: value}) is None,
        "the weights are quantised in a way that is not implemented; start from the half-precision checkpoint",
    ),
    "partial_rotary_factor": (lambda value: value not in (None, 1, 1.0), "partial rotary embedding is not implemented"),
}
"""Key → (whether a value changes the network beyond what is implemented, the message)."""

_ARCHITECTURES: dict[Family, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "granite": "GraniteForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
}
_BIASED = {
    "attention_bias": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp_bias": ("gate_proj", "up_proj", "down_proj"),
}
"""Key → the projections that have a bias if it is true."""
_BIAS_KEYS: dict[Family, tuple[str, ...]] = {
    "llama": ("attention_bias", "mlp_bias"),
    "mistral": (),
    "qwen2": (),
    "qwen3": ("attention_bias",),
    "olmo2": ("attention_bias",),
    "granite": ("attention_bias", "mlp_bias"),
    "smollm3": ("attention_bias", "mlp_bias"),
}
"""The keys of `_BIASED` that a family knows."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_NOT_YET = {
    "phi3": "fused projections",
    "gemma": "scaled embeddings and other norms",
    "gemma2": "soft caps and windows in some layers",
    "gemma3_text": "two rotary bases and windows in some layers",
    "gemma3": "an image encoder",
    "olmo3": "windows in some layers",
    "cohere": "parallel blocks",
}
"""Frequent model types → what the network would need."""
_QK_NORMS: dict[Family, Literal["head", "all"]] = {"qwen3": "head", "olmo2": "all"}
_MULTIPLIERS = {
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}
"""Granite's keys, which are names of our fields, and transformers' defaults."""
_KV_HEADS_AS_HEADS = ("llama", "olmo2", "granite")
"""Families in which all heads have their own keys if num_key_value_heads is missing; elsewhere the default differs."""
_WINDOW_BY_FLAG = ("qwen2", "qwen3", "smollm3")
"""Families whose sliding_window counts if use_sliding_window is true."""


def read_settings(directory: str | Path) -> dict[str, Any]:
    """Content of a checkpoint's config.json; for Meta's files, of the equivalent config.json.

    Raises:
      UserError: there is neither config.json nor params.json, or it cannot be read.
    """
    directory = require_directory(directory, weights=False)
    if (directory / CONFIG_FILE).is_file():
        return read_json(directory / CONFIG_FILE)
    if is_meta(directory):
        return meta_settings(directory)
    raise UserError(f"{directory} has no {CONFIG_FILE}; give a checkpoint directory")


def read_architecture(directory: str | Path) -> LlamaConfig:
    """Sizes of the LLaMA in a directory in the format of Hugging Face, Meta or this project.

    Raises:
      UserError: config.json is missing or incomplete, or has a setting that is not implemented.
    """
    directory = local_checkpoint(directory, weights=False)
    file = PARAMS_FILE if is_meta(directory) else CONFIG_FILE
    return parse_architecture(read_settings(directory), str(directory / file))


def parse_architecture(raw: Mapping[str, Any], origin: str) -> LlamaConfig:
    """`LlamaConfig` from the content of a config.json; `origin` is its name in error messages."""
    family = raw.get("model_type")
    if experts := next((key for key in _EXPERTS if raw.get(key)), None):
        raise UserError(
            f"{origin}: model_type {family!r} is a mixture of experts ({experts} {raw[experts]!r}); expert layers "
            "are not implemented"
        )
    if family not in tuple(_ARCHITECTURES):  # works for a list, too
        known = ", ".join(_ARCHITECTURES)
        missing = _NOT_YET.get(family) if isinstance(family, str) else None
        why = f", which needs {missing}; these are not implemented" if missing else ""
        raise UserError(f"{origin}: model_type is {family!r}{why}; supported are {known}")
    for key, (changes, why) in _UNSUPPORTED.items():
        if key in raw and changes(raw[key]):
            raise UserError(f"{origin}: {key} is {_shown(raw[key])}; {why}")
    sizes = {ours: _size(raw, theirs, origin) for theirs, ours in _REQUIRED.items()}
    heads = sizes["num_heads"]
    kv_heads = _size(raw, "num_key_value_heads", origin, heads if family in _KV_HEADS_AS_HEADS else None)
    if heads % kv_heads:
        raise UserError(f"{origin}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    known_head_dim = 128 if family == "qwen3" else None  # transformers' default for a file without it
    if raw.get("head_dim") is None and known_head_dim is None and sizes["hidden_size"] % heads:
        raise UserError(f"{origin}: hidden_size {sizes['hidden_size']} is not a multiple of the {heads} heads")
    head_dim = _size(raw, "head_dim", origin, known_head_dim or sizes["hidden_size"] // heads)
    if head_dim % 2:
        raise UserError(f"{origin}: head_dim {head_dim} is odd; rotary embeddings rotate pairs of dimensions")
    # In early conversions of LLaMA and in Vicuna 1.5 16k, the context length is max_sequence_length.
    sequence = _size(raw, "max_sequence_length", origin, 1)
    positions = max(sequence, _size(raw, "max_position_embeddings", origin, 2048 if sequence == 1 else sequence))
    return LlamaConfig(
        **sizes,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=_rope_theta(raw, origin),
        rms_norm_eps=_number(raw, "rms_norm_eps", origin, 1e-6),
        max_position_embeddings=positions,
        tie_word_embeddings=_flag(raw, "tie_word_embeddings", origin),
        family=family,
        rope_scaling=_rope_scaling(raw, origin, positions),
        sliding_window=_sliding_window(raw, origin, sizes["num_layers"]),
        biases=_biases(raw, origin),
        activation=_ACTIVATIONS[raw.get("hidden_act", "silu")],
        norms="after" if family == "olmo2" else "before",
        qk_norm=_QK_NORMS.get(family),
        layers_without_rope=_layers_without_rope(raw, origin, sizes["num_layers"]),
        **_multipliers(raw, origin),
    )


def _multipliers(raw: Mapping[str, Any], origin: str) -> dict[str, Any]:
    if raw["model_type"] != "granite":
        return {}
    return {key: _number(raw, key, origin, default) for key, default in _MULTIPLIERS.items()}


def _layers_without_rope(raw: Mapping[str, Any], origin: str, layers: int) -> tuple[int, ...]:
    """SmolLM3: `no_rope_layers` has 0 for a layer without rotary embedding, or every `no_rope_layer_interval`-th is."""
    if raw["model_type"] != "smollm3":
        return ()
    rotated = raw.get("no_rope_layers")
    if rotated is None:
        interval = _size(raw, "no_rope_layer_interval", origin, 4)
        return tuple(layer for layer in range(layers) if (layer + 1) % interval == 0)
    if not isinstance(rotated, list) or len(rotated) != layers or any(flag not in (0, 1) for flag in rotated):
        raise UserError(f"{origin}: no_rope_layers is {rotated!r}, not a 0 or 1 for each of the {layers} layers")
    return tuple(layer for layer, flag in enumerate(rotated) if not flag)


def _shown(value: Any) -> str:
    """A setting for a message; for quantisation settings, the method."""
    method = value.get("quant_method") if isinstance(value, dict) else None
    return f"of quant_method {method!r}" if method else repr(value)


def _biases(raw: Mapping[str, Any], origin: str) -> tuple[str, ...]:
    if raw["model_type"] == "qwen2":
        return ("q_proj", "k_proj", "v_proj")
    family, set_keys = raw["model_type"], [key for key in _BIASED if _flag(raw, key, origin)]
    if unknown := [key for key in set_keys if key not in _BIAS_KEYS[family]]:
        raise UserError(f"{origin}: {unknown[0]} does not apply to model_type {family!r}")
    return tuple(name for key in set_keys for name in _BIASED[key])


def _sliding_window(raw: Mapping[str, Any], origin: str, layers: int) -> int | None:
    """Number of keys visible to a query; the default of transformers for Mistral is 4096 if the setting is missing."""
    family, window = raw["model_type"], raw.get("sliding_window")
    if family == "mistral":
        window = raw.get("sliding_window", 4096)
    elif family not in _WINDOW_BY_FLAG:
        if window:
            raise UserError(f"{origin}: sliding_window is {window!r}; {family} has none")
        return None
    elif not _flag(raw, "use_sliding_window", origin):
        return None
    if window is None:
        return None
    first = 0 if family == "mistral" else _whole(raw, "max_window_layers", origin, 28)
    if first >= layers:
        return None
    if first:
        raise UserError(f"{origin}: max_window_layers is {first}; a window in only some layers is not implemented")
    return _size({"sliding_window": window}, "sliding_window", origin)


def _whole(raw: Mapping[str, Any], key: str, origin: str, default: int) -> int:
    value = raw.get(key, default)
    if type(value) is not int or value < 0:
        raise UserError(f"{origin}: {key} is {value!r}, not a whole number")
    return value


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
    nested = _rope_settings(raw, "rope_parameters", origin).get("rope_theta")
    flat = raw.get("rope_theta")
    if nested is not None and flat is not None and nested != flat:
        raise UserError(f"{origin}: rope_theta is {flat!r}, but rope_parameters.rope_theta is {nested!r}")
    theta = nested if nested is not None else flat
    return _number({} if theta is None else {"rope_theta": theta}, "rope_theta", origin, 10000.0)


def _rope_scaling(raw: Mapping[str, Any], origin: str, positions: int) -> RopeScaling | None:
    """The rope scaling from either of its two keys; a kind that is not implemented is an error, never ignored."""
    found = {key: _parse_scaling(raw, key, origin, positions) for key in ("rope_scaling", "rope_parameters")}
    given = {key: scaling for key, scaling in found.items() if raw.get(key) is not None}
    if len(set(given.values())) > 1:
        raise UserError(f"{origin}: rope_scaling and rope_parameters differ; remove one of them")
    return next(iter(given.values()), None)


def _parse_scaling(raw: Mapping[str, Any], key: str, origin: str, positions: int) -> RopeScaling | None:
    rope = _rope_settings(raw, key, origin)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor", 1) != 1:
        raise UserError(f"{origin}: {key} has a partial rotary embedding, which is not implemented")
    if kind == "default":
        return None
    where = f"{origin}: {key}"
    if kind in ("linear", "dynamic"):
        return RopeScaling(kind, _number(rope, "factor", where, 0.0))
    if kind == "yarn":
        return _yarn(raw, rope, where, positions)
    if kind != "llama3":
        raise UserError(f"{where} has {kind!r}; only linear, llama3, yarn and dynamic are implemented")
    low, high = (_number(rope, key, where, 0.0) for key in ("low_freq_factor", "high_freq_factor"))
    if low >= high:
        raise UserError(f"{where}: low_freq_factor {low:g} is not below high_freq_factor {high:g}")
    return RopeScaling(
        "llama3",
        _number(rope, "factor", where, 0.0),
        low,
        high,
        _size(rope, "original_max_position_embeddings", where, positions),
    )


def _yarn(raw: Mapping[str, Any], rope: Mapping[str, Any], where: str, positions: int) -> RopeScaling:
    """YaRN with transformers' defaults."""
    original = _size(rope, "original_max_position_embeddings", where, positions)
    factor = _number(rope, "factor", where, positions / original)
    scales = [_number(rope, key, where, 1.0) for key in ("mscale", "mscale_all_dim") if rope.get(key)]

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    stated = rope.get("attention_factor")
    computed = magnitude(scales[0]) / magnitude(scales[1]) if len(scales) == 2 else magnitude(1.0)
    return RopeScaling(
        "yarn",
        factor,
        original_max_position_embeddings=original,
        beta_fast=_number(rope, "beta_fast", where, 32.0),
        beta_slow=_number(rope, "beta_slow", where, 1.0),
        attention_factor=computed if stated is None else _number(rope, "attention_factor", where, 1.0),
        truncate=_flag({"truncate": True} | dict(rope), "truncate", where),
    )


def _rope_settings(raw: Mapping[str, Any], key: str, origin: str) -> Mapping[str, Any]:
    rope = raw.get(key)
    if rope is not None and not isinstance(rope, dict):
        raise UserError(f"{origin}: {key} is {rope!r}, not an object")
    return rope or {}


def hugging_face_config(
    config: LlamaConfig, dtype: np.dtype, source: Mapping[str, Any] | None = None, **token_ids: int | None
) -> dict[str, Any]:
    """Content of a config.json that transformers 4 and 5 both read as the same network.

    Args:
      config: sizes.
      dtype: dtype of the stored weights.
      source: the base's config.json; its settings outside of the network (token ids, initializer_range) are kept,
        except auto_map, which names Python files of the base that are not copied.
      token_ids: bos_token_id, eos_token_id, pad_token_id if the source does not have them.
    """
    written = dict(source or {"use_cache": True, "initializer_range": 0.02, "pretraining_tp": 1})
    written.pop("auto_map", None)  # names files of code, which are not copied; transformers has this network itself
    written.pop(QUANTISATION, None)  # the written weights are not quantised
    return (token_ids | written) | {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == config.activation),
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        **_family_settings(config),
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else _scaling_settings(config.rope_scaling),
        "rope_parameters": {"rope_theta": config.rope_theta, **_scaling_settings(config.rope_scaling)},
        "torch_dtype": dtype.name,
        "dtype": dtype.name,
    }


def _family_settings(config: LlamaConfig) -> dict[str, Any]:
    family = config.family
    written: dict[str, Any] = {key: set(_BIASED[key]) <= set(config.biases) for key in _BIAS_KEYS[family]}
    if family == "granite":
        written |= {key: getattr(config, key) for key in _MULTIPLIERS}
    if family == "smollm3":
        written["no_rope_layers"] = [int(layer not in config.layers_without_rope) for layer in range(config.num_layers)]
    if family == "mistral":  # with layer_types, transformers 5 would load it as a Ministral
        written["sliding_window"] = config.sliding_window
    if family in _WINDOW_BY_FLAG:
        # transformers 5 derives layer_types from other settings, unless the file still has those of the base.
        kind = "full_attention" if config.sliding_window is None else "sliding_attention"
        used = {"use_sliding_window": config.sliding_window is not None, "max_window_layers": 0}
        written |= {"sliding_window": config.sliding_window, **used, "layer_types": [kind] * config.num_layers}
    return written


def _scaling_settings(scaling: RopeScaling | None) -> dict[str, Any]:
    """Rope scaling with `type` for transformers 4.42 and older, and `rope_type` for newer releases."""
    if scaling is None:
        return {"rope_type": "default"}
    written = {"rope_type": scaling.kind, "type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        written |= {name: getattr(scaling, name) for name in ("low_freq_factor", "high_freq_factor")}
    if scaling.kind == "yarn":
        names = ("beta_fast", "beta_slow", "attention_factor", "truncate")
        written |= {name: getattr(scaling, name) for name in names}
    if scaling.kind in ("llama3", "yarn"):
        written["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    return written


def generation_config(written: Mapping[str, Any], ends: Sequence[int] = ()) -> dict[str, Any]:
    """Content of a generation_config.json, with token ids only.

    Args:
      written: Content of config.json.
      ends: Every token that ends an answer; () uses the eos_token_id of `written`.

    Sampling fields without `do_sample`, as in old LLaMA and Vicuna files, would make transformers refuse to save.
    """
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    content = {key: written[key] for key in keys if written.get(key) is not None and written[key] != -1}
    if ends:
        content["eos_token_id"] = ends[0] if len(ends) == 1 else list(ends)
    return content
