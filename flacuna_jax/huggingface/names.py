"""The one table between our flat parameter paths and the tensor names of Hugging Face and PEFT files.

Our paths are stacked over layers ("layers/q_proj/weight" [L, out, in]); files hold one tensor per layer. Kernels keep
their [out, in] layout on both sides, so a name is all that changes.
"""

import re
from collections.abc import Iterable

MODULES = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
}
"""Our module of a layer → its place in a Hugging Face layer."""

UNSTACKED = {
    "embed_tokens/weight": "model.embed_tokens.weight",
    "norm/weight": "model.norm.weight",
    "lm_head/weight": "lm_head.weight",
}
"""Our path → Hugging Face name, for what exists once."""

EMBEDDING, HEAD = UNSTACKED["embed_tokens/weight"], UNSTACKED["lm_head/weight"]

PEFT_PREFIX = "base_model.model."

_OUR_MODULE = {theirs: ours for ours, theirs in MODULES.items()}
_OUR_PATH = {theirs: ours for ours, theirs in UNSTACKED.items()}
_LAYER = re.compile(r"model\.layers\.(0|[1-9]\d{0,5})\.(.+)")
_ADAPTER = re.compile(r"(.+)\.(?:lora_([AB])(?:\.default)?\.weight|lora_magnitude_vector(?:\.default)?(?:\.weight)?)")
# With the head among its targets PEFT saves, beside the factors, the frozen tables that it might have resized.
_ADAPTER_BASE = re.compile(r"(model\.embed_tokens|lm_head)(?:\.base_layer)?\.weight")

# Rotary frequencies are a function of the config; files that carry them round them to half precision.
_IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")


def is_stacked(path: str) -> bool:
    """Whether the parameter at `path` has a leading layer axis."""
    return path.startswith("layers/")


def is_ignored(name: str) -> bool:
    """Whether a file may hold `name` without the model having a place for it."""
    return _IGNORED.fullmatch(name) is not None


def tensor_name(path: str, layer: int | None = None) -> str:
    """Hugging Face name of the base parameter at `path`, of one layer of it where it is stacked."""
    if layer is None:
        return UNSTACKED[path]
    _, module, leaf = path.split("/")
    return f"model.layers.{layer}.{MODULES[module]}.{leaf}"


def tensor_names(path: str, num_layers: int) -> tuple[str, ...]:
    """All tensors that make up the parameter at `path`, in layer order."""
    if not is_stacked(path):
        return (tensor_name(path),)
    return tuple(tensor_name(path, layer) for layer in range(num_layers))


def parse_tensor_name(name: str) -> tuple[str, int | None] | None:
    """(path, layer) of a Hugging Face name, None where our model has no such tensor."""
    if name in _OUR_PATH:
        return _OUR_PATH[name], None
    match = _LAYER.fullmatch(name)
    if match is None:
        return None
    module, _, leaf = match[2].rpartition(".")
    if module not in _OUR_MODULE or leaf not in (("weight",) if module.endswith("layernorm") else ("weight", "bias")):
        return None
    return f"layers/{_OUR_MODULE[module]}/{leaf}", int(match[1])


def adapter_name(path: str, layer: int) -> str:
    """PEFT's name of one layer of the adapter parameter at `path` ("layers/q_proj/lora_a", "lm_head/lora_b")."""
    module, _, leaf = path.rpartition("/")
    kernel = tensor_name(f"{module}/weight", layer if is_stacked(path) else None).removesuffix(".weight")
    if leaf == "lora_magnitude":
        return f"{PEFT_PREFIX}{kernel}.lora_magnitude_vector"
    return f"{PEFT_PREFIX}{kernel}.lora_{leaf[-1].upper()}.weight"


def parse_adapter_name(name: str) -> tuple[str, int] | None:
    """(path, layer) of a PEFT adapter name, None where it is not an adapter's part of a projection or of the head.

    The infix ".default" that training checkpoints carry is accepted. The head's layer is 0.
    """
    match = _ADAPTER.fullmatch(name)
    if match is None or not name.startswith(PEFT_PREFIX):
        return None
    kernel = parse_tensor_name(f"{match[1].removeprefix(PEFT_PREFIX)}.weight")
    if kernel is None or not kernel[0].endswith(("_proj/weight", "lm_head/weight")):
        return None
    leaf = f"lora_{match[2].lower()}" if match[2] else "lora_magnitude"
    return f"{kernel[0].removesuffix('/weight')}/{leaf}", kernel[1] or 0


def parse_table_in_adapter(name: str) -> str | None:
    """Path of the base's table that an adapter's file repeats under `name`, None where it is something else."""
    match = _ADAPTER_BASE.fullmatch(name.removeprefix(PEFT_PREFIX))
    return None if match is None else _OUR_PATH[f"{match[1]}.weight"]


def is_training_checkpoint(tensors: Iterable[str]) -> bool:
    """Whether names are those of a PEFT model saved whole, base and adapter, rather than of a LLaMA or an adapter."""
    found = [name for name in tensors if name.startswith(PEFT_PREFIX)]
    return any(".lora_A." in name for name in found) and any(".lora_" not in name for name in found)


def some(items: list[str], limit: int = 6) -> str:
    """The first few of a list, and how many more there are."""
    rest = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {rest} more" if rest > 0 else "")
