"""Converts between `LlamaConfig` and config.json of transformers 4 (`rope_theta`) and 5 (`rope_parameters`)."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.families import BIASED, MEMBERS, NOT_YET, Member, Settings
from flacuna_jax.huggingface.files.json_file import read_json
from flacuna_jax.huggingface.files.meta import PARAMS_FILE, is_meta, meta_settings
from flacuna_jax.huggingface.files.place import local_checkpoint, require_directory
from flacuna_jax.huggingface.files.quantised import KEY as QUANTISATION
from flacuna_jax.huggingface.files.quantised import method_of
from flacuna_jax.huggingface.rope_settings import rope_fields, rope_settings
from flacuna_jax.huggingface.values import flag, number, size, whole
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
    "use_bidirectional_attention": (bool, "attention to later tokens is not implemented"),
}
"""Key → (whether a value changes the network beyond what is implemented, the message)."""
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_WHOLE, _WINDOWED = "full_attention", "sliding_attention"
"""The kinds of layers in layer_types."""


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


def parse_architecture(raw: Settings, origin: str) -> LlamaConfig:
    """`LlamaConfig` from the content of a config.json; `origin` is its name in error messages."""
    family = raw.get("model_type")
    if experts := next((key for key in _EXPERTS if raw.get(key)), None):
        raise UserError(
            f"{origin}: model_type {family!r} is a mixture of experts ({experts} {raw[experts]!r}); expert layers "
            "are not implemented"
        )
    if family not in tuple(MEMBERS):  # works for a list, too
        known = ", ".join(MEMBERS)
        missing = NOT_YET.get(family) if isinstance(family, str) else None
        why = f", which needs {missing}; this is not implemented" if missing else ""
        raise UserError(f"{origin}: model_type is {family!r}{why}; supported are {known}")
    member = MEMBERS[family]
    raw = {**member.defaults, **raw}
    if member.activation_key != "hidden_act":
        raw["hidden_act"] = raw[member.activation_key]
    for key, (changes, why) in _UNSUPPORTED.items():
        if key in raw and changes(raw[key]):
            raise UserError(f"{origin}: {key} is {_shown(raw[key])}; {why}")
    sizes: dict[str, Any] = {ours: size(raw, theirs, origin) for theirs, ours in _REQUIRED.items()}
    heads, layers = sizes["num_heads"], sizes["num_layers"]
    kv_heads = size(raw, "num_key_value_heads", origin, heads if member.own_kv_heads else None)
    if heads % kv_heads:
        raise UserError(f"{origin}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if raw.get("head_dim") is None and sizes["hidden_size"] % heads:
        raise UserError(f"{origin}: hidden_size {sizes['hidden_size']} is not a multiple of the {heads} heads")
    head_dim = size(raw, "head_dim", origin, sizes["hidden_size"] // heads)
    if head_dim % 2:
        raise UserError(f"{origin}: head_dim {head_dim} is odd; rotary embeddings rotate pairs of dimensions")
    # In early conversions of LLaMA and in Vicuna 1.5 16k, the context length is max_sequence_length.
    sequence = size(raw, "max_sequence_length", origin, 1)
    positions = max(sequence, size(raw, "max_position_embeddings", origin, 2048 if sequence == 1 else sequence))
    fields: dict[str, Any] = {
        **member.network,
        **_biases(raw, origin, member),
        **{ours: _optional(raw, theirs, origin) for theirs, ours in member.numbers.items()},
        **rope_fields(raw, origin, member, positions, head_dim),
    }
    if member.scaled_embeddings:
        fields["embedding_multiplier"] = math.sqrt(sizes["hidden_size"])
        fields["attention_multiplier"] = number(raw, "query_pre_attn_scalar", origin, 0.0) ** -0.5
    if family == "smollm3":
        raw["no_rope_layers"] = _rotated_layers(raw, origin, layers)
        fields["layers_without_rope"] = tuple(i for i, flag in enumerate(raw["no_rope_layers"]) if not flag)
    return LlamaConfig(
        **sizes,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=number(raw, "rms_norm_eps", origin, 1e-6),
        max_position_embeddings=positions,
        tie_word_embeddings=flag(raw, "tie_word_embeddings", origin),
        family=family,
        activation=_ACTIVATIONS[raw.get("hidden_act", "silu")],
        **_windows(raw, origin, member, layers),
        **fields,
    )


def _optional(raw: Settings, key: str, origin: str) -> float | None:
    return None if raw.get(key) is None else number(raw, key, origin, 0.0)


def _rotated_layers(raw: Settings, origin: str, layers: int) -> list[int]:
    """SmolLM3: `no_rope_layers` has 0 for a layer without rotary embedding, or every `no_rope_layer_interval`-th is."""
    rotated = raw.get("no_rope_layers")
    if rotated is None:
        interval = size(raw, "no_rope_layer_interval", origin, 4)
        return [int((layer + 1) % interval != 0) for layer in range(layers)]
    if not isinstance(rotated, list) or len(rotated) != layers or any(flag not in (0, 1) for flag in rotated):
        raise UserError(f"{origin}: no_rope_layers is {rotated!r}, not a 0 or 1 for each of the {layers} layers")
    return rotated


def _shown(value: Any) -> str:
    """A setting for a message; for quantisation settings, the method."""
    method = value.get("quant_method") if isinstance(value, dict) else None
    return f"of quant_method {method!r}" if method else repr(value)


def _biases(raw: Settings, origin: str, member: Member) -> dict[str, tuple[str, ...]]:
    set_keys = [key for key in BIASED if flag(raw, key, origin)]
    if unknown := [key for key in set_keys if key not in member.bias_keys]:
        raise UserError(f"{origin}: {unknown[0]} does not apply to model_type {raw['model_type']!r}")
    return {"biases": tuple(name for key in set_keys for name in BIASED[key])} if set_keys else {}


def _windows(raw: Settings, origin: str, member: Member, layers: int) -> dict[str, Any]:
    """The window, and the layers that have it: `layer_types` lists them, or the rule of the member's kind."""
    family, window, types = raw["model_type"], raw.get("sliding_window"), _layer_types(raw, origin, layers)
    if member.windowed is None:
        if window or "sliding_attention" in (types or ()):
            key = "sliding_window" if window else "layer_types"
            raise UserError(f"{origin}: {key} is {raw[key]!r}; {family} has none")
        return {}
    if (member.window_flag and not flag(raw, "use_sliding_window", origin)) or window is None:
        return {}
    if types is not None and not member.layer_types:
        raise UserError(f"{origin}: layer_types does not apply to model_type {family!r}; use 'ministral'")
    for key in ("max_window_layers", "sliding_window_pattern"):
        whole(raw, key, origin, 1)
    rule = member.windowed(raw, layers) if types is None else (i for i, kind in enumerate(types) if kind != _WHOLE)
    windowed = tuple(rule)
    if not windowed:
        return {}
    found = size({"sliding_window": window}, "sliding_window", origin)
    return {"sliding_window": found, "windowed_layers": None if len(windowed) == layers else windowed}


def _layer_types(raw: Settings, origin: str, layers: int) -> list[str] | None:
    types = raw.get("layer_types")
    if types is None:
        return None
    known = isinstance(types, list) and all(kind in (_WHOLE, _WINDOWED) for kind in types)
    if not known or len(types) != layers:
        raise UserError(f"{origin}: layer_types is not one of {_WHOLE}, {_WINDOWED} for each of the {layers} layers")
    return types


def hugging_face_config(
    config: LlamaConfig, dtype: np.dtype, source: Settings | None = None, **token_ids: int | None
) -> dict[str, Any]:
    """Content of a config.json that transformers 4 and 5 both read as the same network.

    Args:
      config: sizes.
      dtype: dtype of the stored weights.
      source: the base's config.json; its settings outside of the network (token ids, initializer_range) are kept,
        except auto_map, which names Python files of the base that are not copied.
      token_ids: bos_token_id, eos_token_id, pad_token_id if the source does not have them.
    """
    member = MEMBERS[config.family]
    activation = next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == config.activation)
    written = dict(source or {"use_cache": True, "initializer_range": 0.02, "pretraining_tp": 1})
    written.pop("auto_map", None)  # names files of code, which are not copied; transformers has this network itself
    written.pop(QUANTISATION, None)  # the written weights are not quantised
    return (token_ids | written) | {
        "architectures": [member.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": activation,
        member.activation_key: activation,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
        **_member_settings(config, member),
        **rope_settings(config, member),
        "torch_dtype": dtype.name,
        "dtype": dtype.name,
    }


def _member_settings(config: LlamaConfig, member: Member) -> dict[str, Any]:
    written: dict[str, Any] = {key: set(BIASED[key]) <= set(config.biases) for key in member.bias_keys}
    written |= {theirs: getattr(config, ours) for theirs, ours in member.numbers.items()}
    if member.scaled_embeddings and config.attention_multiplier is not None:
        scalar = round(config.attention_multiplier**-2, 6)
        written["query_pre_attn_scalar"] = int(scalar) if scalar.is_integer() else scalar
    if config.layers_without_rope:
        written["no_rope_layers"] = [int(layer not in config.layers_without_rope) for layer in range(config.num_layers)]
    return written | _window_settings(config, member)


def _window_settings(config: LlamaConfig, member: Member) -> dict[str, Any]:
    if member.windowed is None:
        return {}
    layers = range(config.num_layers)
    windowed = [layer for layer in layers if config.in_layer(layer, True, False)]
    written: dict[str, Any] = {"sliding_window": config.sliding_window}
    if member.window_flag:
        first = min(windowed, default=0)
        written |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": first}
    if member.layer_types:  # otherwise, transformers 5 would load a Mistral as a Ministral
        # transformers 5 derives them from other settings, unless the file still has those of the base.
        written["layer_types"] = [_WINDOWED if layer in windowed else _WHOLE for layer in layers]
    return written


def generation_config(written: Settings, ends: Sequence[int] = ()) -> dict[str, Any]:
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
