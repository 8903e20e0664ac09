"""config.json from the metadata of a GGUF file, and the metadata of a model from its sizes."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.architecture import hugging_face_config, parse_architecture
from flacuna_jax.huggingface.files.tensors import MappedFiles
from flacuna_jax.huggingface.gguf.architectures import (
    EMBEDDING,
    HEAD,
    KEYS,
    LONGROPE,
    ROPE_FACTORS,
    WHOLE,
    WINDOW,
    WINDOW_PATTERN,
    WINDOWED,
    Architecture,
    architecture_in,
    layers_with_window,
)
from flacuna_jax.huggingface.gguf.header import Header
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.rope import RopeScaling, rope_frequencies

_ROPE = "rope.scaling."
_SCALING = ("type", "factor", "original_context_length", "attn_factor", "yarn_beta_fast", "yarn_beta_slow", "finetuned")
_CHECKED = {
    "vocab_size",
    "rope.dimension_count",
    "attention.value_length",
    "rope.scale_linear",
    *(f"{_ROPE}{key}" for key in _SCALING),
}
"""Keys that are used or compared, in addition to those of the tables; some of them do not change the network."""
_TOKEN_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
"""Key of config.json → name of the token in tokenizer.ggml.…_token_id."""
_BIASES = {"attention_bias": "blk.0.attn_output.bias", "mlp_bias": "blk.0.ffn_down.bias"}
"""Key of config.json → a tensor that exists if it is true."""
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ORIGINAL_CONTEXTS = tuple(1 << power for power in range(4, 22))


def settings_of(header: Header) -> dict[str, Any]:
    """Content of the config.json that is equivalent to a file's metadata.

    Raises:
      UserError: the architecture is not supported, a size is missing, or a setting is not implemented.
    """
    origin, prefix = str(header.path), header.architecture
    architecture = architecture_in(header)
    member = architecture.member
    own = {
        key.removeprefix(f"{prefix}."): value for key, value in header.metadata.items() if key.startswith(prefix + ".")
    }
    written = {theirs: _plain(own[ours], ours, origin) for ours, theirs in _keys(architecture).items() if ours in own}
    if EMBEDDING not in header.tensors:
        raise UserError(f"{origin} has no tensor {EMBEDDING}; it is not a language model")
    written |= {
        "model_type": architecture.family,
        "vocab_size": header.tensors[EMBEDDING].shape[0],
        "tie_word_embeddings": HEAD not in header.tensors,
        "torch_dtype": _dtype(header),
        **{key: header.get(f"tokenizer.ggml.{name}_token_id", int) for key, name in _TOKEN_IDS.items()},
    }
    if member.partial_rotary:
        written["partial_rotary_factor"] = own.get("rope.dimension_count", _head_dim(written)) / _head_dim(written)
    elif "head_dim" not in written and "rope.dimension_count" in own:
        written["head_dim"] = own["rope.dimension_count"]
    written = {**architecture.absent, **architecture.implied(written), **written, **_windows(own, architecture, origin)}
    written |= {key: True for key, tensor in _BIASES.items() if tensor in header.tensors}
    written |= _scaling(header, own, architecture, written)
    _check_unused(own, architecture, written, origin)
    config = parse_architecture(written, origin)
    return {key: value for key, value in written.items() if value is not None or key in member.defaults} | {
        "architectures": hugging_face_config(config, np.dtype(np.float32))["architectures"]
    }


def _windows(own: Mapping[str, Any], architecture: Architecture, origin: str) -> dict[str, Any]:
    """The window if it is 0, which is none; the layers that have one, if a file lists them or has their period."""
    found: dict[str, Any] = {} if own.get(WINDOW, 1) else {"sliding_window": None}
    pattern = own.get(WINDOW_PATTERN)
    if architecture.whole_every is None or pattern is None:
        return found
    if isinstance(pattern, list):
        return found | {"layer_types": [WINDOWED if has_window else WHOLE for has_window in pattern]}
    if type(pattern) is not int:
        raise UserError(f"{origin}: {WINDOW_PATTERN} is {pattern!r}, not a number or a list")
    return found | {"layer_types": layers_with_window(pattern, own.get("block_count", 0))}


def _head_dim(settings: Mapping[str, Any]) -> int:
    return settings.get("head_dim") or settings.get("hidden_size", 0) // (settings.get("num_attention_heads") or 1)


def _keys(architecture: Architecture) -> Mapping[str, str]:
    return {**KEYS, **architecture.keys}


def _plain(value: Any, key: str, origin: str) -> Any:
    """A number as it was before it was rounded to float32; one for all layers if each layer has its own."""
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise UserError(f"{origin}: {key} differs between layers, which is not implemented")
        value = value[0]
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _dtype(header: Header) -> str:
    """The dtype of most values; float32 for quantised ones, which are dequantised."""
    counts: dict[str, int] = {}
    for tensor in header.tensors.values():
        name = _DTYPES.get(tensor.kind, "float32")
        counts[name] = counts.get(name, 0) + math.prod(tensor.shape)
    return max(counts, key=lambda name: counts[name])


def _check_unused(own: Mapping[str, Any], architecture: Architecture, written: Mapping[str, Any], origin: str) -> None:
    head_dim = _head_dim(written)
    rotated = () if architecture.member.partial_rotary else ("rope.dimension_count",)
    for key in ("attention.value_length", *rotated):
        if own.get(key, head_dim) != head_dim:
            raise UserError(f"{origin}: {key} is {own[key]!r}, but heads have size {head_dim}; this is not implemented")
    known = {*_keys(architecture), *_CHECKED, *(() if architecture.whole_every is None else (WINDOW_PATTERN,))}
    if unknown := [key for key, value in own.items() if key not in known and value]:
        raise UserError(f"{origin}: the setting {unknown[0]} ({own[unknown[0]]!r}) is not implemented")


def _scaling(
    header: Header, own: Mapping[str, Any], architecture: Architecture, written: Mapping[str, Any]
) -> dict[str, Any]:
    """The keys of config.json about rope scaling."""
    origin = str(header.path)
    if any(name in header.tensors for name in LONGROPE.values()):
        return _longrope(header, own, origin)
    return {"rope_scaling": _factors(header, own, architecture, written, origin)}


def _longrope(header: Header, own: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """LongRoPE, of which files have the divisors of all frequencies in tensors."""
    if missing := [name for name in LONGROPE.values() if name not in header.tensors]:
        raise UserError(f"{origin} has no tensor {missing[0]}, which belongs to LongRoPE")
    if ROPE_FACTORS in header.tensors or own.get(f"{_ROPE}factor", 1.0) not in (0.0, 1.0):
        raise UserError(f"{origin} has another rope scaling in addition to LongRoPE, which is not implemented")
    scaling: dict[str, Any] = {"rope_type": "longrope"}
    for key, name in LONGROPE.items():
        divisors = header.tensors[name].stored.read(MappedFiles()).tolist()
        scaling[key] = [_plain(divisor, name, origin) for divisor in divisors]
    scaling["attention_factor"] = _plain(own.get(f"{_ROPE}attn_factor", 1.0), "attn_factor", origin)
    original = own.get(f"{_ROPE}original_context_length")
    return {"rope_scaling": scaling, **({} if original is None else {"original_max_position_embeddings": original})}


def _factors(
    header: Header, own: Mapping[str, Any], architecture: Architecture, written: Mapping[str, Any], origin: str
) -> dict[str, Any] | None:
    given = {key.removeprefix(_ROPE): value for key, value in own.items() if key.startswith(_ROPE)}
    kind = given.get("type", "none")
    if ROPE_FACTORS in header.tensors:
        return _llama3(header, written, origin)
    if "type" not in given and (old := own.get("rope.scale_linear", given.get("factor", 1.0))) not in (0.0, 1.0):
        return {"rope_type": "linear", "factor": _plain(old, "rope.scale_linear", origin)}
    if kind == "none":
        return None
    if kind not in ("linear", "yarn") or "factor" not in given:
        raise UserError(f"{origin}: {_ROPE}type is {kind!r}; only linear and yarn, with a factor, are implemented")
    if architecture.unclear_attn_factor and given.get("attn_factor", 1.0) != 1:
        raise UserError(
            f"{origin}: {_ROPE}attn_factor is {given['attn_factor']:g}; llama.cpp and its converter disagree about its "
            f"meaning in {architecture.family}; use the checkpoint in Hugging Face form"
        )
    factor = _plain(given["factor"], "factor", origin)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    scaling = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": given.get(
            "original_context_length", written.get("max_position_embeddings")
        ),
        "attention_factor": _plain(given.get("attn_factor", 1.0), "attn_factor", origin) * _yarn_magnitude(factor),
    }
    for key, theirs in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if key in given:
            scaling[theirs] = _plain(given[key], key, origin)
    return scaling


def _yarn_magnitude(factor: float) -> float:
    """YaRN's factor of attention, which llama.cpp computes itself."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def _llama3(header: Header, written: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Llama 3's scaling, of which files have only the divisor of every frequency."""
    divisors = header.tensors[ROPE_FACTORS].stored.read(MappedFiles()).astype(np.float64)
    head_dim, theta = 2 * len(divisors), written.get("rope_theta", 10000.0)
    factor = float(f"{divisors.max():.6g}")  # without the rounding of the divisors to float32
    for original in _ORIGINAL_CONTEXTS:
        scaling = RopeScaling("llama3", factor, original_max_position_embeddings=original)
        if np.allclose(rope_divisors(head_dim, theta, scaling), divisors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": original,
            }
    raise UserError(f"{origin}: {ROPE_FACTORS} is not of Llama 3's scaling with its factors 1 and 4; not implemented")


def rope_divisors(head_dim: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """What a scaling divides every frequency by, float64 [head_dim / 2]."""
    plain, scaled = (rope_frequencies(head_dim, theta, kind).astype(np.float64) for kind in (None, scaling))
    return plain / scaled


def rope_tensors(config: LlamaConfig) -> dict[str, np.ndarray]:
    """Name → divisors of rotary frequencies, float32, for those scalings whose files have them."""
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "llama3":
        return {ROPE_FACTORS: rope_divisors(config.head_dim, config.rope_theta, scaling).astype(np.float32)}
    if scaling is not None and scaling.kind == "longrope":
        return {name: np.array(getattr(scaling, key), np.float32) for key, name in LONGROPE.items()}
    return {}


def metadata_of(config: LlamaConfig, architecture: Architecture) -> dict[str, Any]:
    """The metadata of a model's sizes, with the prefix of its architecture.

    Raises:
      UserError: a setting cannot be expressed.
    """
    raw = hugging_face_config(config, np.dtype(np.float32))
    known = {theirs: raw[theirs] for theirs in _keys(architecture).values()}
    absent = {**architecture.member.defaults, **architecture.absent}
    needed = {key: absent[key] for key, value in known.items() if value is None and absent.get(key) is not None}
    for key, value in {**architecture.implied(raw), **needed}.items():
        if raw[key] != value:
            raise UserError(f"GGUF files of architecture {architecture.name} cannot express {key} {raw[key]!r}")
    if config.layers_without_rope not in ((), tuple(range(3, config.num_layers, 4))):
        raise UserError("GGUF files cannot express no_rope_layers other than every fourth")
    own = {ours: raw[theirs] for ours, theirs in _keys(architecture).items() if raw[theirs] is not None}
    own |= {
        "attention.value_length": config.head_dim,
        "rope.dimension_count": 2 * len(config.rope_frequencies),
        "vocab_size": config.vocab_size,
        **_scaling_metadata(config),
    }
    if architecture.whole_every is not None:
        own.setdefault(WINDOW, 0)  # llama.cpp has other defaults
    return {f"{architecture.name}.{key}": value for key, value in own.items()}


def _scaling_metadata(config: LlamaConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    if scaling is None or scaling.kind == "llama3":
        return {}
    original = scaling.original_max_position_embeddings
    stretched = scaling.kind != "longrope" or scaling.factor == config.max_position_embeddings / original
    if scaling.kind == "dynamic" or not scaling.truncate or not stretched:
        raise UserError(f"GGUF files cannot express rope scaling {scaling.kind!r} with these settings")
    if scaling.kind == "linear":
        return {f"{_ROPE}type": "linear", f"{_ROPE}factor": scaling.factor}
    if scaling.kind == "longrope":
        return {f"{_ROPE}original_context_length": original, f"{_ROPE}attn_factor": scaling.attention_factor}
    share = scaling.attention_factor / _yarn_magnitude(scaling.factor)
    return {
        f"{_ROPE}type": "yarn",
        f"{_ROPE}factor": scaling.factor,
        f"{_ROPE}original_context_length": original,
        **({} if share == 1 else {f"{_ROPE}attn_factor": share}),
        f"{_ROPE}yarn_beta_fast": scaling.beta_fast,
        f"{_ROPE}yarn_beta_slow": scaling.beta_slow,
    }
