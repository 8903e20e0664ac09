"""A preference learnt on held-out items: a small model that talks at length learns by DPO to answer in a word."""

import json
from pathlib import Path
from random import Random

import numpy as np
import pytest

from flacuna_jax import Decoding, load_config, load_model, open_run
from flacuna_jax.demo.corpus import CorpusSizes, build_corpus, is_held_out
from flacuna_jax.demo.families import FAMILIES
from tests.small_run import write_run

pytestmark = pytest.mark.slow
OBJECTIVE = {"name": "dpo", "sft_weight": 1.0}
"""DPO by itself makes the rejected answers unlikely, but not the chosen ones likely, and this small model then writes
something else."""
SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}


def pairs(count: int, *, held_out: bool) -> list[dict]:
    """Requests of the demo's conversations; the chosen answer is the word, the rejected one the friendly reply."""
    rng, made = Random(f"pairs {held_out}"), {}
    families = [family for family in FAMILIES if not family.facts and family.name != "extraction"]
    while len(made) < count:
        family = rng.choice(families)
        item = family.draw(rng)
        if is_held_out(item.key, 0) == held_out:
            user, friendly = (pattern.format(**item.fields) for pattern in rng.choice(family.chats))
            made[user] = {"prompt": user, "chosen": item.fields["answer"], "rejected": friendly}
    return [pair for pair in made.values() if pair["chosen"] != pair["rejected"]]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model that was trained on some of the demo's conversations."""
    directory = tmp_path_factory.mktemp("base")
    config = write_run(
        directory,
        lora=None,
        model={"architecture": {**SIZES, "max_position_embeddings": 512}},
        data={"max_length": 512},
        training={"learning_rate": 3e-3, "batch_size": 32, "epochs": 2, "micro_batch_size": 4},
        checkpoint={"every_steps": 10**6},
    )
    corpus = build_corpus(0, CorpusSizes(conversations=800, instructions=10, held_out=4))
    (directory / "data.json").write_text(json.dumps(corpus.conversations))
    with open_run(load_config(config), say=lambda _: None) as run:
        run.train()
        return run.deliver()


def test_dpo_teaches_short_answers_to_held_out_requests(base, tmp_path):
    config = write_run(
        tmp_path,
        lora={"rank": 8, "alpha": 16.0, "dropout": 0.0, "targets": ["all-linear"]},
        data={"max_length": 512},
        training={"objective": OBJECTIVE, "learning_rate": 3e-3, "batch_size": 16, "micro_batch_size": 4},
        evaluation={"sources": [{"path": str(tmp_path / "held_out.json")}], "every_steps": 20, "samples": 0},
    )
    (tmp_path / "data.json").write_text(json.dumps(pairs(640, held_out=False)))
    held_out = pairs(60, held_out=True)
    (tmp_path / "held_out.json").write_text(json.dumps(held_out))
    model = f"--model={{path: {base}, dtype: float32}}"
    with open_run(load_config(config, [model]), say=lambda _: None) as run:
        run.train()
        adapter = run.deliver()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [record for record in records if record.get("kind") == "evaluation"]
    print({name: (first[name], last[name]) for name in first if name.startswith("eval/")})
    assert first["eval/rewards/margin"] == 0
    assert first["eval/loss"] - first["eval/nll"] == pytest.approx(np.log(2), abs=1e-5)
    assert last["eval/rewards/accuracy"] > 0.95
    assert last["eval/rewards/margin"] > 1

    def words(directory: Path | None) -> float:
        chat = load_model(str(base), adapter=directory, dtype="float32", say=lambda _: None)
        answers = chat.generate([pair["prompt"] for pair in held_out[:20]], Decoding(max_new_tokens=64))
        return float(np.mean([len(answer.text.split()) for answer in answers]))

    before, after = words(None), words(adapter)
    print({"words before": before, "words after": after})
    assert after < 0.5 * before
