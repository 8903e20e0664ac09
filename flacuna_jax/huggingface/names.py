"""Maps names of tensors in files of Hugging Face and PEFT to the paths of our parameters, which are stacked over
layers.

Each parameter has its names in `model.variables.ParamInfo`; this module looks them up. Kernels have the layout
[out, in] on both sides, so only the names differ.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from flacuna_jax.model import llama
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.lora import PEFT_LEAVES
from flacuna_jax.model.parameters import base_parameters, tensors_in_order
from flacuna_jax.model.variables import ParamInfo

PEFT_PREFIX = "base_model.model."

EMBEDDING, HEAD = (f"{module.of_layer()}.weight" for module in (llama.EMBEDDING, llama.HEAD))
"""The tables of the vocabulary, for reading files without a config."""

ADAPTER = re.compile(r"(.+)\.(?:(lora_[AB])(?:\.default)?\.weight|(lora_magnitude_vector)(?:\.default)?(?:\.weight)?)")

# Rotary frequencies are computed from the config; in files they are rounded to half precision.
_IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")
_LAYER = re.compile(r"(?<=\.)(?:0|[1-9]\d{0,5})(?=\.)")


def is_ignored(name: str) -> bool:
    """Whether a file may contain `name` although the model has no such parameter."""
    return _IGNORED.fullmatch(name) is not None


def parse_tensor_name(name: str, config: LlamaConfig) -> tuple[str, int | None] | None:
    """(path, layer) of a Hugging Face name; None if the model has no such tensor.

    The layer is None for parameters outside of the layers. A number beyond the model's layers is returned unchanged.
    """
    number = _LAYER.search(name)
    pattern = name if number is None else f"{name[: number.start()]}{{}}{name[number.end() :]}"
    path = None if "{}" in name else _paths(config).get(pattern)
    return None if path is None else (path, None if number is None else int(number[0]))


@functools.lru_cache(maxsize=64)
def _paths(config: LlamaConfig) -> Mapping[str, str]:
    """Maps names, with {} for the layer, to paths."""
    return {f"{found.module.pattern}.{found.leaf}": path for path, found in base_parameters(config).items()}


class Part(NamedTuple):
    """One layer of a parameter, and its rows in a tensor of a file. The layer is None outside of the layers."""

    path: str
    layer: int | None
    rows: slice


@functools.lru_cache(maxsize=64)
def stored_parts(config: LlamaConfig) -> Mapping[str, tuple[Part, ...]]:
    """The contents of the tensors of a Hugging Face file, in the order in which a forward pass uses them: one parameter
    each, or the modules of a fused projection."""
    parts: dict[str, tuple[Part, ...]] = {}
    for path, layer in tensors_in_order(config):
        parameter = base_parameters(config)[path]
        first = 0 if parameter.rows is None else parameter.rows.first
        part = Part(path, layer, slice(first, first + parameter.layer_shape[0]))
        name = parameter.stored(layer)
        parts[name] = (*parts.get(name, ()), part)
    return parts


def adapter_name(parameter: ParamInfo, layer: int) -> str:
    """PEFT's name of one layer of an adapter's parameter; `layer` is ignored outside of the layers."""
    return f"{PEFT_PREFIX}{parameter.tensor(layer)}"


def layer_of(module: str) -> int | None:
    """The layer in the name of a module, "model.layers.3.mlp.up_proj"; None outside of the layers."""
    found = _LAYER.search(module)
    return None if found is None else int(found[0])


def parse_adapter_name(name: str, config: LlamaConfig) -> tuple[str, int] | None:
    """(path, layer) of a PEFT adapter name; None if it is not an adapter's part of a projection or of the head.

    The infix ".default" in training checkpoints is accepted. The head's layer is 0.
    """
    match = ADAPTER.fullmatch(name)
    if match is None or not name.startswith(PEFT_PREFIX):
        return None
    kernel = parse_tensor_name(f"{match[1].removeprefix(PEFT_PREFIX)}.weight", config)
    if kernel is None or base_parameters(config)[kernel[0]].kind != "matrix":
        return None
    return f"{kernel[0].rpartition('/')[0]}/{_KINDS[match[2] or match[3]]}", kernel[1] or 0


_KINDS = {leaf.removesuffix(".weight"): kind for kind, leaf in PEFT_LEAVES.items()}


def tensor_in_adapter(name: str) -> tuple[str, str] | None:
    """(module, part) of a tensor in an adapter's file that is not a factor of a projection; None for other names.

    The part is "weight" or "bias" for one that replaces the base's, "rows" for trained rows of a table,
    "lora_embedding_A" or "lora_embedding_B". The infixes of PEFT's wrappers are left out.
    """
    match = _BESIDES_FACTORS.fullmatch(name)
    return None if match is None else (match[1], "rows" if match[2] == _ROWS else match[2])


_ROWS = "trainable_tokens_delta"
_WRAPPERS = r"(?:\.token_adapter|\.base_layer|\.modules_to_save)*"
_BESIDES_FACTORS = re.compile(
    rf"{re.escape(PEFT_PREFIX)}((?!.*lora_[AB]).+?){_WRAPPERS}(?:\.default)?"
    rf"\.(weight|bias|lora_embedding_[AB]|{_ROWS})(?:\.default)?"
)


def is_training_checkpoint(tensors: Iterable[str]) -> bool:
    """Whether the names are those of a whole PEFT model with base and adapter, not of a LLaMA or an adapter."""
    found = [name for name in tensors if name.startswith(PEFT_PREFIX)]
    return any(".lora_A." in name for name in found) and any(".lora_" not in name for name in found)


def some(items: list[str], limit: int = 6) -> str:
    """The first items of a list, and the number of the others."""
    rest = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {rest} more" if rest > 0 else "")
