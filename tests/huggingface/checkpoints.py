"""Small checkpoints in every layout in use, written by the real libraries."""

import dataclasses
import json
from pathlib import Path

from flacuna_jax.model.llama import LlamaConfig
from tests.tiny import SMALL
from tests.torch_models import torch, torch_llama, transformers

GROUPED = dataclasses.replace(SMALL, num_heads=6, num_kv_heads=2, head_dim=10, rope_theta=5e5, rms_norm_eps=1e-5)
TIED = dataclasses.replace(SMALL, vocab_size=61, tie_word_embeddings=True)
ARCHITECTURES = {"plain": SMALL, "grouped": GROUPED, "tied": TIED}


@dataclasses.dataclass(frozen=True)
class Written:
    """A checkpoint directory, the torch model it was written from, and its sizes."""

    path: Path
    model: transformers.LlamaForCausalLM
    config: LlamaConfig


def save(model: transformers.LlamaForCausalLM, path: Path, layout: str) -> None:
    """Writes `model` as "safetensors", "safetensors sharded", "bin", "bin sharded" or "bin old" (before torch 1.6)."""
    if layout.startswith("safetensors"):
        model.save_pretrained(path, max_shard_size="40KB" if layout.endswith("sharded") else "5GB")
        return
    model.config.save_pretrained(path)
    state = model.state_dict()
    zipped = layout != "bin old"
    if layout != "bin sharded":
        torch.save(state, path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        return
    names = list(state)
    weight_map = {}
    for shard in range(3):
        file = f"pytorch_model-{shard + 1:05}-of-00003.bin"
        part = {name: state[name].clone() for name in names[shard::3]}
        torch.save(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write(config: LlamaConfig, path: Path, *, half: bool = False, layout: str = "safetensors") -> Written:
    """A random model of the given sizes, written to `path`."""
    model = torch_llama(config)
    model = model.half() if half else model
    save(model, path, layout)
    return Written(path, model, config)
