"""PEFT adapter directories as every release of PEFT, and vLLM, read them."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from flacuna_jax.config import LoraConfig
from flacuna_jax.huggingface import names
from flacuna_jax.huggingface.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter
from flacuna_jax.huggingface.safetensors_file import write_file
from flacuna_jax.huggingface.tensors import cast

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def write_adapter_files(
    directory: Path,
    adapter: Adapter,
    *,
    dtype: str = "float32",
    facts: Mapping[str, str] | None = None,
) -> None:
    """Writes adapter_config.json, adapter_model.safetensors and README.md into an existing directory.

    Args:
      directory: see `directories.whole_directory`.
      adapter: what to write.
      dtype: "float32" as PEFT writes it, or "bfloat16".
      facts: lines for the model card, by label (data, steps, results).
    """
    config = json.dumps(adapter_config(adapter), indent=2, sort_keys=True)
    (directory / CONFIG_FILE).write_text(config + "\n", encoding="utf-8")
    stored = DTYPES[dtype]
    tensors = {
        names.adapter_name(path, layer): cast(adapter.factor(path, layer), stored)
        for path in adapter.params
        for layer in adapter.layers_of(path.rpartition("/")[0])
    }
    ordered = sorted(tensors)
    described = [(name, tensors[name].shape, stored) for name in ordered]
    write_file(directory / WEIGHTS_FILE, described, (functools.partial(tensors.__getitem__, name) for name in ordered))
    (directory / "README.md").write_text(model_card(adapter, facts or {}), encoding="utf-8")


def adapter_config(adapter: Adapter) -> dict[str, Any]:
    """The settings that every PEFT release since 0.5 understands, and vLLM's; newer ones would only make it warn."""
    lora = adapter.lora
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_name,
        "revision": None,
        "inference_mode": True,
        "auto_mapping": None,
        "r": lora.rank,
        "lora_alpha": _short(lora.alpha),
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None if lora.layers_to_transform is None else list(lora.layers_to_transform),
        "layers_pattern": None,
        "rank_pattern": dict(lora.rank_pattern),
        "alpha_pattern": {pattern: _short(alpha) for pattern, alpha in lora.alpha_pattern},
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
    }


def _short(alpha: float) -> int | float:
    return int(alpha) if alpha.is_integer() else alpha


def model_card(adapter: Adapter, facts: Mapping[str, str]) -> str:
    """README.md of an adapter: what it is, what it was made from, how to load it."""
    base = adapter.base_name or "the base model"
    lora = adapter.lora
    head = ["---", "library_name: peft", "tags: [lora, flacuna]"]
    if adapter.base_name:
        head.append(f"base_model: {json.dumps(adapter.base_name)}")
    rows = {
        "base model": base,
        "DoRA" if lora.use_dora else "LoRA": _described(lora),
    } | dict(facts)
    return "\n".join(
        [
            *head,
            "---",
            "",
            "# LoRA adapter",
            "",
            "Trained with flacuna_jax.",
            "",
            *(f"- {label}: {value}" for label, value in rows.items()),
            "",
            "```python",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f"base = AutoModelForCausalLM.from_pretrained({json.dumps(base)})",
            'model = PeftModel.from_pretrained(base, "path/to/this/directory")',
            "```",
            "",
        ]
    )


def _described(lora: LoraConfig) -> str:
    text = f"rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g} on {', '.join(lora.targets)}"
    if lora.layers_to_transform is not None:
        text += f" of layers {', '.join(map(str, lora.layers_to_transform))}"
    for name, pattern in (("rank", lora.rank_pattern), ("alpha", lora.alpha_pattern)):
        text += "".join(f"; {name} {value:g} in {module}" for module, value in pattern)
    return text + ("; rank-stabilised" if lora.use_rslora else "")
