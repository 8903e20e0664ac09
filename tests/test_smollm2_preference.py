"""Preference objectives on SmolLM2 and real pairs against TRL's trainers with PEFT adapters, float32, LoRA on q and v.

Ours gets records, TRL the texts that the tokenizer's own template makes of them; the token ids must be the same. The
pairs are of the HHH alignment benchmark, in one packed row here and padded there.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flacuna_jax import open_run, parse_config
from flacuna_jax.config.objectives import DpoConfig, KtoConfig, OrpoConfig, PreferenceConfig, SimpoConfig
from flacuna_jax.data.pipeline import StepSource
from flacuna_jax.data.store import TokenStore
from flacuna_jax.model.parameters import Params
from flacuna_jax.training.preference import preference_objective
from flacuna_jax.training.step import StepConfig, loss_and_gradients
from tests.test_smollm2 import smollm2  # noqa: F401

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from trl.experimental.cpo import CPOConfig, CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOConfig, ORPOTrainer  # noqa: E402

from tests.training.test_preference_against_trl import theirs  # noqa: E402
from tests.training.test_step_against_peft import adapters_of, relative_error  # noqa: E402

pytestmark = pytest.mark.slow

PAIRS, LENGTH, RANK, ALPHA, TARGETS = 2, 384, 8, 16, ["q_proj", "v_proj"]
PER_TOKEN, LOSS, GRADIENT = 1e-4, 1e-5, 1e-4
"""Absolute error of log-probabilities and of losses, relative error of gradients: float32 through 30 layers, whose
sums two libraries add in different orders."""


class Peer(NamedTuple):
    """A trainer of TRL, and the objective of ours that should equal it."""

    trainer: Any
    config: Any
    arguments: Mapping[str, Any]
    objective: PreferenceConfig


REFERENCE_FREE = {"remove_unused_columns": False, "disable_dropout": True}
PEERS = {
    "dpo": Peer(trl.DPOTrainer, trl.DPOConfig, {}, DpoConfig(name="dpo")),
    "hinge": Peer(
        trl.DPOTrainer,
        trl.DPOConfig,
        {"loss_type": ["hinge"], "beta": 0.02},
        DpoConfig(name="dpo", loss="hinge", beta=0.02),
    ),
    "ipo": Peer(trl.DPOTrainer, trl.DPOConfig, {"loss_type": ["ipo"]}, DpoConfig(name="dpo", loss="ipo")),
    "robust": Peer(
        trl.DPOTrainer,
        trl.DPOConfig,
        {"loss_type": ["robust"], "label_smoothing": 0.1},
        DpoConfig(name="dpo", loss="robust", label_smoothing=0.1),
    ),
    "cpo": Peer(
        CPOTrainer,
        CPOConfig,
        {**REFERENCE_FREE, "loss_type": "sigmoid", "cpo_alpha": 0.5},
        DpoConfig(name="dpo", reference="none", sft_weight=0.5),
    ),
    "simpo": Peer(
        CPOTrainer,
        CPOConfig,
        {**REFERENCE_FREE, "loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
        SimpoConfig(name="simpo"),
    ),
    "orpo": Peer(ORPOTrainer, ORPOConfig, REFERENCE_FREE, OrpoConfig(name="orpo", sft_on="all")),
    "kto": Peer(
        trl.KTOTrainer, trl.KTOConfig, {"undesirable_weight": 1.5}, KtoConfig(name="kto", undesirable_weight=1.5)
    ),
}


@pytest.fixture(scope="module")
def pairs(test_data: Path) -> list[dict[str, str]]:
    """The shortest pairs of different questions whose answers are sentences."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted((test_data / "hhh" / "derived_bigbench_layout").glob("*/task.json")):
        for example in json.loads(path.read_text())["examples"]:
            rejected, chosen = sorted(example["target_scores"], key=example["target_scores"].__getitem__)
            found.setdefault(example["input"], {"prompt": example["input"], "chosen": chosen, "rejected": rejected})
    if not found:
        pytest.skip("FLACUNA_TEST_DATA has no HHH pairs")
    sentences = [pair for pair in found.values() if min(len(pair["chosen"]), len(pair["rejected"])) > 60]
    return sorted(sentences, key=lambda pair: sum(map(len, pair.values())))[:PAIRS]


def records_of(pairs: list[dict[str, str]], labelled: bool) -> list[dict[str, Any]]:
    if not labelled:
        return pairs
    sides = ["chosen" if index % 3 else "rejected" for index in range(len(pairs))]
    return [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair, side in zip(pairs, sides, strict=True)
    ]


class Ours(NamedTuple):
    config: StepConfig
    base: Params
    store: TokenStore
    batch: Mapping[str, jax.Array]


@pytest.fixture(scope="module")
def ours(smollm2, pairs, tmp_path_factory) -> Callable[[str], Ours]:  # noqa: F811
    """The step, the base and the only batch of a run with one of the objectives' names."""

    @functools.cache
    def opened(name: str) -> Ours:
        directory = tmp_path_factory.mktemp(name)
        (directory / "data.json").write_text(json.dumps(records_of(pairs, labelled=name == "kto")))
        config = parse_config(
            {
                "output_dir": str(directory / "run"),
                "model": {"path": str(smollm2), "dtype": "float32"},
                "lora": {"rank": RANK, "alpha": ALPHA, "dropout": 0.0, "targets": TARGETS},
                "data": {"sources": [{"path": str(directory / "data.json")}], "max_length": LENGTH},
                "training": {"objective": {"name": name}, "batch_size": PAIRS, "micro_batch_size": 1, "epochs": 1},
                "mesh": {"data": 1},
                "logging": {"tensorboard": False},
            }
        )
        with open_run(config, say=lambda _: None) as run:
            setup = run.setup
            assert setup.plan.total_steps == 1
            batch = {name: jnp.asarray(leaf) for name, leaf in StepSource(setup.store, setup.plan)[0].items()}
            return Ours(setup.step_config, run.base, setup.store, batch)

    return opened


def open_theirs(peer: Peer, model: Path, records: list[dict[str, Any]], directory: Path) -> Any:
    """A trainer of a fresh copy of the model whose adapters have random numbers in both matrices."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    texts = [
        {**record, "prompt": tokenizer.apply_chat_template(
            [{"role": "user", "content": record["prompt"]}], tokenize=False, add_generation_prompt=True
        )}
        for record in records
    ]  # fmt: skip
    settings = {
        "output_dir": str(directory), "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no",
        "gradient_checkpointing": False, "per_device_train_batch_size": len(texts),
        "train_sampling_strategy": "sequential", "max_length": 512,
    }  # fmt: skip
    trainer = peer.trainer(
        transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        args=peer.config(**settings | dict(peer.arguments)),
        train_dataset=datasets.Dataset.from_list(texts),
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return trainer


def our_documents(store: TokenStore) -> list[tuple[list[int], int]]:
    """All documents in order up to their last token with loss, with the lengths of their prompts."""
    documents = []
    for index in range(len(store)):
        for document in store.example(index).documents:
            first, *_, last = np.flatnonzero(document.loss_mask).tolist()
            documents.append((document.ids[: last + 1].tolist(), first))
    return documents


def their_documents(trainer: Any) -> list[tuple[list[int], int]]:
    documents = []
    for one in trainer.train_dataset:
        if "chosen_input_ids" in one:
            for name in ("chosen", "rejected"):
                documents.append((one[f"{name}_input_ids"], one[f"{name}_labels"].count(-100)))
            continue
        names = ("completion_ids", "KL_completion_ids") if "completion_ids" in one else ("chosen_ids", "rejected_ids")
        documents += [(one["prompt_ids"] + one[name], len(one["prompt_ids"])) for name in names]
    return documents


@pytest.mark.parametrize("name", PEERS)
def test_losses_gradients_and_log_probabilities_equal_those_of_trl(name, ours, smollm2, pairs, tmp_path):  # noqa: F811
    peer = PEERS[name]
    config, base, store, batch = ours("kto" if name == "kto" else "dpo")
    trainer = open_theirs(peer, smollm2, records_of(pairs, labelled=name == "kto"), tmp_path)
    assert our_documents(store) == their_documents(trainer)
    adapters = {path: jnp.asarray(value) for path, value in adapters_of(trainer.model, config.spec).items()}
    config = dataclasses.replace(config, objective=preference_objective(peer.objective))

    expected, metrics = theirs(trainer)
    run = jax.jit(loss_and_gradients, static_argnums=0)
    loss, scalars, gradients = run(config, adapters, base, batch, jnp.int32(0))
    assert float(loss) == pytest.approx(expected, abs=LOSS)
    by_mean = isinstance(peer.objective, SimpoConfig | OrpoConfig)
    for answer in ("chosen", "rejected"):
        tokens = 1 if by_mean else float(scalars[f"length/{answer}"])
        error = abs(float(scalars[f"rewards/{answer}"]) - metrics[f"rewards/{answer}"]) / peer.objective.beta
        assert error < PER_TOKEN * tokens, answer
        if not by_mean:
            assert abs(float(scalars[f"logps/{answer}"]) - metrics[f"logps/{answer}"]) < PER_TOKEN * tokens, answer
    for path, value in adapters_of(trainer.model, config.spec, gradients=True).items():
        assert relative_error(gradients[path], value) < GRADIENT, path
