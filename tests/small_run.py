"""Creates the input of a whole run in a temporary directory: tokenizer, instruction file, config, without sample
data."""

import json
import random
from pathlib import Path

import sentencepiece
import yaml

from flacuna_jax.data.layouts import system_text

WORDS = ["red", "blue", "green", "seven", "three", "cat", "dog", "house", "tree", "river", "small", "large", "name"]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_position_embeddings": 256,
}


def records(count: int, seed: int = 0) -> list[dict]:
    """FLAN-mini records with the task of reversing three words."""
    rng = random.Random(seed)
    made = []
    for index in range(count):
        words = rng.sample(WORDS, 3)
        turns = [
            {"from": "human", "value": f"reverse {' '.join(words)}"},
            {"from": "gpt", "value": " ".join(words[::-1])},
        ]
        made.append({"id": f"r{index}", "source": "test", "conversations": turns})
    return made


def write_tokenizer(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    text = directory / "text.txt"
    system = system_text("vicuna_v1.1")
    lines = (f"{system} USER: reverse {' '.join(random.Random(i).sample(WORDS, 6))} ASSISTANT: yes" for i in range(300))
    text.write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    text.unlink()
    return directory


def write_run(directory: Path, count: int = 60, **sections) -> Path:
    """Writes the input of a run from scratch and returns its config; `sections` extend or replace its sections."""
    write_tokenizer(directory / "tokenizer")
    (directory / "data.json").write_text(json.dumps(records(count)))
    config = {
        "output_dir": str(directory / "run"),
        "model": {
            "init": "random",
            "dtype": "float32",
            "tokenizer": str(directory / "tokenizer"),
            "architecture": dict(SIZES),
        },
        "lora": {"rank": 2, "dropout": 0.05, "targets": ["q_proj", "v_proj"]},
        "data": {"sources": [{"path": str(directory / "data.json")}], "max_length": 400},
        "training": {"learning_rate": 1e-2, "batch_size": 8, "micro_batch_size": 1, "epochs": 2, "remat": "none"},
        "mesh": {"fsdp": 1},
        "checkpoint": {"every_steps": 3},
        "logging": {"every_steps": 1, "tensorboard": False},
    }
    for name, section in sections.items():
        config[name] = {**config.get(name, {}), **section} if isinstance(section, dict) else section
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
