"""Writes PEFT adapter directories that every release of PEFT and vLLM can read."""

import functools
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from flacuna_jax.huggingface import names
from flacuna_jax.huggingface.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter
from flacuna_jax.huggingface.card import Facts, adapter_card
from flacuna_jax.huggingface.files.safetensors_file import write_file
from flacuna_jax.huggingface.files.tensors import cast
from flacuna_jax.huggingface.fused_adapter import Factors, join
from flacuna_jax.model.llama import EMBEDDING, HEAD
from flacuna_jax.model.variables import Parameter

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def write_adapter_files(
    directory: Path,
    adapter: Adapter,
    *,
    dtype: str = "float32",
    facts: Facts | None = None,
) -> None:
    """Writes adapter_config.json, adapter_model.safetensors and README.md into an existing directory.

    Args:
      directory: see `directories.whole_directory`.
      adapter: the adapter to write.
      dtype: "float32" as in PEFT, or "bfloat16".
      facts: for the model card.
    """
    fused, tensors = _in_files(adapter)
    config = json.dumps(adapter_config(adapter) | fused, indent=2, sort_keys=True)
    (directory / CONFIG_FILE).write_text(config + "\n", encoding="utf-8")
    stored = DTYPES[dtype]
    ordered = sorted(tensors)
    described = [(name, tensors[name].shape, stored) for name in ordered]
    write_file(
        directory / WEIGHTS_FILE, described, (functools.partial(cast, tensors[name], stored) for name in ordered)
    )
    card = adapter_card(adapter.lora, adapter.base_name, adapter.base_revision, facts or Facts())
    (directory / "README.md").write_text(card, encoding="utf-8")


def _layers(adapter: Adapter, path: str, parameter: Parameter) -> list[int]:
    return [0] if parameter.kind == "token_rows" else adapter.layers_of(path.rpartition("/")[0])


def _in_files(adapter: Adapter) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Settings that differ from the adapter's own because projections of its base are fused, and the tensors."""
    if not adapter.spec.config.fused_projections:
        return {}, {
            names.adapter_name(parameter, layer): adapter.factor(path, layer)
            for path, parameter in adapter.spec.adapters.items()
            for layer in _layers(adapter, path, parameter)
        }
    factors = {}
    for module, name in adapter.spec.linear.items():
        for layer in adapter.layers_of(module):
            a_ri, b_or = (adapter.factor(f"{module}/{kind}", layer) for kind in ("lora_a", "lora_b"))
            magnitude_o = adapter.factor(f"{module}/lora_magnitude", layer) if adapter.lora.use_dora else None
            scale = adapter.lora.scale_of(name.of_layer(layer))
            factors[name.of_layer(layer)] = Factors(a_ri, b_or, scale, magnitude_o)
    rows = {path: parameter for path, parameter in adapter.spec.adapters.items() if parameter.kind == "token_rows"}
    settings, tensors = join(factors, adapter.spec.config, adapter.lora.use_rslora)
    tensors |= {names.adapter_name(parameter, 0): adapter.factor(path, 0) for path, parameter in rows.items()}
    for key, value in settings.items():
        if key.startswith("alpha") or key == "lora_alpha":
            settings[key] = _short(value) if key == "lora_alpha" else {name: _short(x) for name, x in value.items()}
    return settings, tensors


def adapter_config(adapter: Adapter) -> dict[str, Any]:
    """The settings that vLLM and every PEFT release since 0.5 understand; newer settings would cause warnings."""
    lora = adapter.lora
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": adapter.base_name,
        "revision": adapter.base_revision,
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
        **_trained_tokens(adapter),
    }


def _trained_tokens(adapter: Adapter) -> dict[str, Any]:
    """A list is for the embedding, and for a head that is tied to it."""
    tokens = adapter.spec.tokens
    if not tokens.head:
        return {"trainable_token_indices": list(tokens.embedding)} if tokens.embedding else {}
    by_module = {EMBEDDING.last: list(tokens.embedding), HEAD.last: list(tokens.head)}
    return {"trainable_token_indices": {module: ids for module, ids in by_module.items() if ids}}


def _short(alpha: float) -> int | float:
    return int(alpha) if alpha.is_integer() else alpha
