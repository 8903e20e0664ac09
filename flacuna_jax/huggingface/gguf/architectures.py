"""What the architectures of llama.cpp are in Hugging Face's terms: settings, names of tensors, changes of values."""

import dataclasses
from collections.abc import Mapping

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.gguf import gguf_package
from flacuna_jax.model.llama import LlamaConfig
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
    """

    name: str
    family: str
    permuted: bool = False
    norm_offset: float = 0.0
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def head_dim_of(self, parameter: Parameter, config: LlamaConfig) -> int:
        """The size of the heads in which the rows of a tensor are permuted; 0 if they are not."""
        return config.head_dim if self.permuted and parameter.module.last in ("q_proj", "k_proj") else 0

    def offset_of(self, parameter: Parameter) -> float:
        return self.norm_offset if parameter.kind == "norm" else 0.0


_ALL = (
    Architecture("llama", "llama", permuted=True),
    Architecture("qwen2", "qwen2"),
    Architecture("qwen3", "qwen3"),
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
)
ARCHITECTURES = {architecture.name: architecture for architecture in _ALL}
_OF_FAMILY = {architecture.family: architecture for architecture in _ALL} | {"mistral": ARCHITECTURES["llama"]}

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

EMBEDDING, HEAD, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"
"""Tensors outside of the layers; the last one has the divisors of rotary frequencies, for Llama 3's scaling."""


def architecture_named(name: str, origin: str) -> Architecture:
    """Raises `UserError` for an architecture that is not in the table."""
    if name not in ARCHITECTURES:
        raise UserError(f"{origin}: the architecture is {name!r}; supported are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def architecture_of(config: LlamaConfig) -> Architecture:
    """The architecture in which llama.cpp knows a model. Raises `UserError` if there is none."""
    if config.family not in _OF_FAMILY:
        raise UserError(
            f"GGUF of model_type {config.family!r} is not implemented; supported are {', '.join(_OF_FAMILY)}"
        )
    return _OF_FAMILY[config.family]


@dataclasses.dataclass(frozen=True)
class NamedTensor:
    """A tensor by all its names: llama.cpp's, Hugging Face's, and our parameter."""

    theirs: str
    name: str
    parameter: Parameter


def named_tensors(architecture: Architecture, config: LlamaConfig) -> list[NamedTensor]:
    """The tensors of a model with llama.cpp's names, which are those of the package gguf."""
    gguf = gguf_package()
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture.name)
    table = gguf.get_tensor_name_map(number, config.num_layers)
    found = []
    for parameter in base_parameters(config).values():
        for name in parameter.tensors:
            theirs = table.get_name(name, try_suffixes=(".weight", ".bias"))
            if theirs is None:
                raise UserError(f"{name} has no name in GGUF files of architecture {architecture.name}")
            found.append(NamedTensor(theirs, name, parameter))
    return found
