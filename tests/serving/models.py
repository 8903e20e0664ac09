"""A server of the small trained LLaMA with two adapters."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flacuna_jax import serve
from flacuna_jax.config.model import LoraConfig
from flacuna_jax.huggingface.adapter import Adapter
from flacuna_jax.huggingface.architecture import read_architecture
from flacuna_jax.huggingface.deliver import write_adapter
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.serving.guard import Guard
from flacuna_jax.serving.scheduler import Scheduler
from flacuna_jax.verbs.serve import prepare

ADAPTERS = {
    "small": LoraConfig(rank=2, alpha=4.0, targets=("q_proj", "v_proj")),
    "large": LoraConfig(
        rank=5, alpha=3.0, targets="all-linear", rank_pattern=(("layers.0.self_attn.q_proj", 3),), use_rslora=True
    ),
}


def make_adapter(directory: Path, base: Path, lora: LoraConfig, seed: int) -> Path:
    """A random adapter that changes the base's answers, in PEFT's form."""
    config = read_architecture(base)
    spec, rng = ModelSpec(config, lora), np.random.default_rng(seed)
    params = {path: 0.2 * rng.standard_normal(shape).astype(np.float32) for path, shape in spec.lora_shapes.items()}
    for module, (ranks, _) in spec.ranks.items():
        for layer, rank in enumerate(ranks):
            params[f"{module}/lora_a"][layer, rank:] = params[f"{module}/lora_b"][layer, :, rank:] = 0
    write_adapter(directory, Adapter(spec, params, str(base)), config, trained=True)
    return directory


def make_adapters(directory: Path, base: Path) -> dict[str, Path]:
    found = enumerate(ADAPTERS.items())
    return {name: make_adapter(directory / name, base, lora, seed) for seed, (name, lora) in found}


def prepared(base: Path, adapters: dict[str, Path], *options: str) -> tuple[Scheduler, Guard]:
    """What `flacuna serve` runs, in float32, so that its texts can be compared."""
    named: Sequence[str] = [word for name, path in adapters.items() for word in ("--adapter", f"{name}={path}")]
    words = ["--model", str(base), "--name", "base", "--dtype", "float32", *named, *options]
    return prepare(serve.parser().parse_args(words))
