"""vLLM's requirements for a LoRA adapter (its lora/peft_helper.py and lora/utils.py), checked without vLLM."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flacuna_jax.config.types import TARGETS
from flacuna_jax.huggingface.adapter import CONFIG_FILE, LEGACY_WEIGHTS_FILE, WEIGHTS_FILE
from flacuna_jax.huggingface.files.json_file import read_json
from flacuna_jax.huggingface.files.safetensors_file import read_header
from flacuna_jax.huggingface.files.tensors import StoredTensor
from flacuna_jax.huggingface.files.torch_file import read_torch_file

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of --max-lora-rank."""
_DEFAULT_RANK = 16
_MODULES = frozenset({*TARGETS, "qkv_proj", "gate_up_proj", "embed_tokens"})
_ENDINGS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")


def vllm_violations(directory: Path) -> list[str]:
    """Reasons why vLLM would not load an adapter directory, or would compute something else; empty if there are none.

    Raises:
      UserError: a file cannot be read.
    """
    settings = read_json(directory / CONFIG_FILE)
    return [*_settings_violations(settings), *_tensor_violations(_tensors(directory), settings)]


def vllm_options(directory: Path) -> str:
    """Command-line options of vLLM for an adapter that it can serve."""
    rank = read_json(directory / CONFIG_FILE)["r"]
    enough = next(allowed for allowed in _RANKS if allowed >= rank)
    return "--enable-lora" + (f" --max-lora-rank {enough}" if rank > _DEFAULT_RANK else "")


def _settings_violations(settings: Mapping[str, Any]) -> Iterator[str]:
    for key in ("r", "lora_alpha", "target_modules"):
        if settings.get(key) is None:
            yield f"{key} is missing"
    if settings.get("modules_to_save"):
        yield "modules_to_save is not supported"
    if settings.get("trainable_token_indices"):
        yield "trainable_token_indices is not supported; merge the adapter instead"
    if settings.get("use_dora"):
        yield "use_dora: DoRA is not supported; merge the adapter instead"
    if settings.get("bias", "none") != "none":
        yield f"bias is {settings['bias']!r}; only none is supported"
    for key in ("rank_pattern", "alpha_pattern"):
        if settings.get(key):
            yield f"{key} is ignored: every module would get the scale of r and lora_alpha; merge the adapter instead"
    rank = settings.get("r")
    if isinstance(rank, int) and not 1 <= rank <= _RANKS[-1]:
        yield f"rank {rank} is above the largest --max-lora-rank, {_RANKS[-1]}"
    alpha = settings.get("lora_alpha")
    if alpha is not None and not (isinstance(alpha, int | float) and math.isfinite(alpha)):
        yield f"lora_alpha is {alpha!r}, not a number"


def _tensors(directory: Path) -> dict[str, StoredTensor]:
    if (directory / WEIGHTS_FILE).is_file():
        return read_header(directory / WEIGHTS_FILE)[0]
    return read_torch_file(directory / LEGACY_WEIGHTS_FILE)


def _tensor_violations(tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any]) -> Iterator[str]:
    for name, tensor in sorted(tensors.items()):
        ending = next((ending for ending in _ENDINGS if name.endswith(ending)), None)
        if ending is None or not name.startswith("base_model.model."):
            yield f"{name} is not the name of a LoRA weight"
            continue
        module = name.removesuffix(ending).rsplit(".", 1)[-1]
        if module not in _MODULES:
            yield f"{name}: {module} is not a module that can have an adapter"
        rank = tensor.shape[0 if ending[6] == "A" else -1] if len(tensor.shape) == 2 else None
        if ending.endswith(".weight") and rank != settings.get("r"):
            yield f"{name} has shape {list(tensor.shape)}, which does not have rank {settings.get('r')}"
