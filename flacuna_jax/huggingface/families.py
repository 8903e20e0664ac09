"""The members of the family: what a model_type means beyond the sizes in config.json, as transformers implements it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flacuna_jax.model.llama import Family

Settings = Mapping[str, Any]
"""Content of a config.json."""

BIASED = {
    "attention_bias": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp_bias": ("gate_proj", "up_proj", "down_proj"),
}
"""Key → the projections that have a bias if it is true."""


@dataclass(frozen=True)
class Member:
    """One model_type.

    Attributes:
      architecture: the class in transformers.
      network: fields of `LlamaConfig` that no setting changes.
      defaults: transformers' values of keys that a file may lack, if they differ from those of other members.
      bias_keys: the keys of `BIASED` that it knows.
      own_kv_heads: whether all heads have their own keys if num_key_value_heads is missing.
      activation_key: the key of the activation.
      scaled_embeddings: whether embeddings are multiplied by √hidden_size, and scores by query_pre_attn_scalar^-½.
      numbers: key → field of `LlamaConfig`, for positive numbers; null is None.
      windowed: (settings, number of layers) → the layers to which sliding_window applies, for files without
        layer_types; None: it has no window.
      window_flag: whether sliding_window counts only if use_sliding_window is true.
      layer_types: whether its files may list the layers with a window.
      rope_theta: transformers' rotary base for a file without it.
      rope_by_layer_type: whether layers with a window have their own rotary embedding, without scaling.
      windowed_rope_theta: its base for a file without it; None: that of the other layers.
      partial_rotary: whether partial_rotary_factor counts.
    """

    architecture: str
    network: Settings = field(default_factory=dict)
    defaults: Settings = field(default_factory=dict)
    bias_keys: tuple[str, ...] = ("attention_bias",)
    own_kv_heads: bool = False
    activation_key: str = "hidden_act"
    scaled_embeddings: bool = False
    numbers: Mapping[str, str] = field(default_factory=dict)
    windowed: Callable[[Settings, int], Iterable[int]] | None = None
    window_flag: bool = False
    layer_types: bool = False
    rope_theta: float = 1e4
    rope_by_layer_type: bool = False
    windowed_rope_theta: float | None = None
    partial_rotary: bool = False


def _all(raw: Settings, layers: int) -> Iterable[int]:
    del raw
    return range(layers)


def _from_first(raw: Settings, layers: int) -> Iterable[int]:
    first = raw["max_window_layers"]
    return range(min(first, layers), layers)


def _all_but_every(count: int, key: str | None = None) -> Callable[[Settings, int], Iterable[int]]:
    """All but every `count`-th layer; the setting `key` replaces the count."""
    return lambda raw, layers: (i for i in range(layers) if (i + 1) % (raw.get(key, count) if key else count))


def _without_rope(raw: Settings, layers: int) -> Iterable[int]:
    return (i for i in range(layers) if not raw["no_rope_layers"][i])


_MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
_SOFTCAPS = {"attn_logit_softcapping": "attention_softcap", "final_logit_softcapping": "logits_softcap"}
_GEMMA: dict[str, Any] = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_QWEN: dict[str, Any] = {"max_window_layers": 28, "sliding_window": 4096}

MEMBERS: dict[Family, Member] = {
    "llama": Member("LlamaForCausalLM", bias_keys=tuple(BIASED), own_kv_heads=True),
    "mistral": Member("MistralForCausalLM", defaults={"sliding_window": 4096}, bias_keys=(), windowed=_all),
    "ministral": Member(
        "MinistralForCausalLM", defaults={"sliding_window": 4096}, bias_keys=(), windowed=_all, layer_types=True
    ),
    "qwen2": Member(
        "Qwen2ForCausalLM",
        network={"biases": ("q_proj", "k_proj", "v_proj")},
        defaults=_QWEN,
        bias_keys=(),
        windowed=_from_first,
        window_flag=True,
        layer_types=True,
    ),
    "qwen3": Member(
        "Qwen3ForCausalLM",
        network={"qk_norm": "head"},
        defaults={**_QWEN, "head_dim": 128},
        windowed=_from_first,
        window_flag=True,
        layer_types=True,
    ),
    "olmo2": Member("Olmo2ForCausalLM", network={"norms": "after", "qk_norm": "all"}, own_kv_heads=True),
    "olmo3": Member(
        "Olmo3ForCausalLM",
        network={"norms": "after", "qk_norm": "all"},
        own_kv_heads=True,
        defaults={"rms_norm_eps": 1e-5, "sliding_window": 4096},
        rope_theta=5e5,
        windowed=_all_but_every(4),
        layer_types=True,
        rope_by_layer_type=True,
    ),
    "granite": Member(
        "GraniteForCausalLM",
        own_kv_heads=True,
        defaults=dict.fromkeys(_MULTIPLIERS, 1.0),
        bias_keys=tuple(BIASED),
        numbers={key: key for key in _MULTIPLIERS},
    ),
    "smollm3": Member(
        "SmolLM3ForCausalLM",
        defaults={"tie_word_embeddings": True},
        bias_keys=tuple(BIASED),
        windowed=_without_rope,
        window_flag=True,
        layer_types=True,
    ),
    "gemma2": Member(
        "Gemma2ForCausalLM",
        network={"norms": "around", "norm_offset": 1.0},
        activation_key="hidden_activation",
        scaled_embeddings=True,
        defaults={
            **_GEMMA,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        numbers=_SOFTCAPS,
        windowed=_all_but_every(2),
        layer_types=True,
    ),
    "gemma3_text": Member(
        "Gemma3ForCausalLM",
        network={"norms": "around", "norm_offset": 1.0, "qk_norm": "head"},
        activation_key="hidden_activation",
        scaled_embeddings=True,
        defaults={
            **_GEMMA,
            "max_position_embeddings": 131072,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
        },
        rope_theta=1e6,
        windowed_rope_theta=1e4,
        numbers=_SOFTCAPS,
        windowed=_all_but_every(6, "sliding_window_pattern"),
        layer_types=True,
        rope_by_layer_type=True,
    ),
    "phi3": Member(
        "Phi3ForCausalLM",
        network={"fused_projections": True},
        defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
        bias_keys=(),
        own_kv_heads=True,
        windowed=_all,
        partial_rotary=True,
    ),
}

NOT_YET = {
    "gemma3": "an image encoder; its language model alone has model_type 'gemma3_text'",
    "gemma3n": "per-layer embeddings",
    "gemma3n_text": "per-layer embeddings",
    "cohere": "parallel blocks",
    "cohere2": "parallel blocks",
}
"""Frequent model types → what the network would need."""
