"""What the architectures of llama.cpp are in Hugging Face's terms: settings, names of tensors, changes of values."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface import names
from flacuna_jax.huggingface.families import MEMBERS, Member
from flacuna_jax.huggingface.gguf import gguf_package
from flacuna_jax.huggingface.gguf.header import Header
from flacuna_jax.model.llama import Family, LlamaConfig
from flacuna_jax.model.parameters import base_parameters
from flacuna_jax.model.variables import Parameter


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
      name: the value of general.architecture, which is also the prefix of its keys.
      family: model_type of its config.json.
      permuted: whether the rows of q and k are in the order of rotated pairs.
      norm_offset: what is added to the weights of norms.
      keys: key → key of config.json, in addition to `KEYS`.
      fixed: key of config.json → its value in all files.
      absent: key of config.json → its value in a file without it, where transformers has another default.
      whole_every: files have a window for all but every n-th layer; 0: for all layers, which llama.cpp does not apply;
        None: files have none.
      width_layers: the number of layers of the size with query_pre_attn_scalar hidden_size / num_attention_heads; in
        other sizes, it is head_dim.
      unclear_attn_factor: whether YaRN's attn_factor is transformers' attention_factor for the converter of llama.cpp,
        but multiplies YaRN's own factor of attention in llama.cpp.
    """

    name: str
    family: Family
    permuted: bool = False
    norm_offset: float = 0.0
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=lambda: {"hidden_act": "silu"})
    absent: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    whole_every: int | None = None
    width_layers: int = 0
    unclear_attn_factor: bool = False

    @property
    def member(self) -> Member:
        return MEMBERS[self.family]

    def head_dim_of(self, parameter: Parameter, config: LlamaConfig) -> int:
        """The size of the heads in which the rows of a tensor are permuted; 0 if they are not."""
        return config.head_dim if self.permuted and parameter.module.last in ("q_proj", "k_proj") else 0

    def offset_of(self, parameter: Parameter) -> float:
        return self.norm_offset if parameter.kind == "norm" else 0.0

    def implied(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Key of config.json → its value, for those that files do not have; some follow from the sizes."""
        found, layers = dict(self.fixed), settings.get("num_hidden_layers", 0)
        if self.member.scaled_embeddings:
            width = settings.get("hidden_size", 0) // settings.get("num_attention_heads", 1)
            found["query_pre_attn_scalar"] = width if layers == self.width_layers else settings.get("head_dim", width)
        if self.whole_every:
            found["layer_types"] = layers_with_window(self.whole_every, layers)
        return found


def layers_with_window(count: int, layers: int) -> list[str]:
    """layer_types of config.json in which every `count`-th layer has no window; 0: all have one."""
    return [WHOLE if count and (layer + 1) % count == 0 else WINDOWED for layer in range(layers)]


WINDOW, WINDOW_PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
WHOLE, WINDOWED = "full_attention", "sliding_attention"
"""The kinds of layers in layer_types of config.json."""
_FINAL_CAP = {"final_logit_softcapping": "final_logit_softcapping"}
_CAPS = {"attn_logit_softcapping": "attn_logit_softcapping", **_FINAL_CAP}
_TANH = {"hidden_activation": "gelu_pytorch_tanh"}

_ALL = (
    Architecture("llama", "llama", permuted=True),
    Architecture("qwen2", "qwen2"),
    Architecture("qwen3", "qwen3"),
    Architecture("olmo2", "olmo3", keys={WINDOW: "sliding_window"}, whole_every=4, unclear_attn_factor=True),
    Architecture("olmo2", "olmo2"),
    Architecture("smollm3", "smollm3", permuted=True),
    Architecture(
        "granite",
        "granite",
        permuted=True,
        keys={
            "embedding_scale": "embedding_multiplier",
            "attention.scale": "attention_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
    ),
    Architecture(
        "gemma2",
        "gemma2",
        norm_offset=1.0,
        keys={WINDOW: "sliding_window", **_CAPS},
        fixed=_TANH,
        whole_every=2,
        width_layers=46,
    ),
    Architecture(
        "gemma3",
        "gemma3_text",
        norm_offset=1.0,
        keys={WINDOW: "sliding_window", "rope.freq_base_swa": "rope_local_base_freq", **_FINAL_CAP},
        fixed={**_TANH, "attn_logit_softcapping": None},
        absent={"sliding_window": None},
        whole_every=6,
        width_layers=62,
    ),
    Architecture("phi3", "phi3", keys={WINDOW: "sliding_window"}, whole_every=0),
)
ARCHITECTURES = {architecture.name: architecture for architecture in _ALL}
_OF_FAMILY: dict[Family, Architecture] = {architecture.family: architecture for architecture in _ALL} | {
    "mistral": ARCHITECTURES["llama"]
}

KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
"""Key of every architecture, without its prefix → key of config.json."""

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
ROPE_FACTORS = "rope_freqs.weight"
"""The divisors of rotary frequencies, for Llama 3's scaling, ..."""
LONGROPE = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
"""... and for LongRoPE, by their keys in config.json."""
ROPE_TENSORS = (ROPE_FACTORS, *LONGROPE.values())


def architecture_in(header: Header) -> Architecture:
    """The architecture of a file. Raises `UserError` if it is not in the table."""
    name = header.architecture
    if name not in ARCHITECTURES:
        raise UserError(f"{header.path}: the architecture is {name!r}; supported are {', '.join(ARCHITECTURES)}")
    if name == "olmo2" and f"{name}.{WINDOW}" in header.metadata:
        return _OF_FAMILY["olmo3"]
    return ARCHITECTURES[name]


def architecture_of(config: LlamaConfig) -> Architecture:
    """The llama.cpp architecture of a model. Raises `UserError` if llama.cpp does not support the model."""
    if config.family not in _OF_FAMILY:
        raise UserError(
            f"GGUF of model_type {config.family!r} is not implemented; supported are {', '.join(_OF_FAMILY)}"
        )
    return _OF_FAMILY[config.family]


@dataclasses.dataclass(frozen=True)
class NamedTensor:
    """A tensor by all its names: llama.cpp's, Hugging Face's, and our parameter (of a fused matrix, the first one)."""

    theirs: str
    name: str
    parameter: Parameter


def named_tensors(architecture: Architecture, config: LlamaConfig) -> list[NamedTensor]:
    """The tensors of a model with llama.cpp's names, which are those of the package gguf."""
    gguf = gguf_package()
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture.name)
    table = gguf.get_tensor_name_map(number, config.num_layers)
    found = []
    for name, parts in names.stored_parts(config).items():
        theirs = table.get_name(name, try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise UserError(f"{name} has no name in GGUF files of architecture {architecture.name}")
        found.append(NamedTensor(theirs, name, base_parameters(config)[parts[0].path]))
    return found
