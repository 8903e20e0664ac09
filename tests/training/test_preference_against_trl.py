"""Preference objectives against TRL's trainers with PEFT adapters: losses, log-probabilities, gradients, trajectory.

Float32, no dropout, the token ids that TRL's trainer made.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.config.objectives import DpoConfig, KtoConfig, OrpoConfig, PreferenceConfig, SimpoConfig
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.training.network import REFERENCE, NetworkConfig
from flacuna_jax.training.preference import preference_objective
from flacuna_jax.training.step import StepConfig, loss_and_gradients
from tests.tiny import SMALL, in_steps, to_device
from tests.torch_models import from_torch, torch, torch_llama, transformers

pytest.importorskip("peft")
trl = pytest.importorskip("trl")

from trl.experimental.cpo import CPOConfig, CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOConfig, ORPOTrainer  # noqa: E402

from tests.training.test_step_against_peft import adapters_of, peft_model, relative_error, run_ours  # noqa: E402

LORA = LoraConfig(rank=4, alpha=12.0, dropout=0.0)
SPEC = ModelSpec(SMALL, LORA, "float32", "float32")
LENGTH, PAIRS = 64, 6


@pytest.fixture(scope="module")
def tokenizer():
    """Words t3 ... t96 are the ids 3 ... 96."""
    import tokenizers

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"t{index}": index for index in range(3, SMALL.vocab_size)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


def words(rng: np.random.Generator, low: int, high: int) -> str:
    return " ".join(f"t{index}" for index in rng.integers(3, SMALL.vocab_size, int(rng.integers(low, high))))


def records(count: int = PAIRS, seed: int = 5) -> list[dict[str, str]]:
    rng = np.random.default_rng(seed)
    names, sizes = ("prompt", "chosen", "rejected"), ((3, 7), (2, 9), (2, 9))
    made = [{name: words(rng, *size) for name, size in zip(names, sizes, strict=True)} for _ in range(count)]
    return [{**one, "prompt": f"<s> {one['prompt']}", "chosen": f"{one['chosen']} ", "rejected": f"{one['rejected']} "}
            for one in made]  # fmt: skip


def trainer_of(kind, config, model, data, tokenizer, directory, **settings):
    import datasets

    common = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "logging_steps": 1,
              "max_grad_norm": 1.0, "lr_scheduler_type": "constant", "learning_rate": 5e-3, "warmup_steps": 0,
              "train_sampling_strategy": "sequential", "max_length": LENGTH}  # fmt: skip
    common |= {"per_device_train_batch_size": len(data), "output_dir": str(directory), "save_strategy": "no"}
    arguments = config(**{**common, **settings})
    return kind(model, args=arguments, train_dataset=datasets.Dataset.from_list(data), processing_class=tokenizer)


def rows_of(pairs: list[tuple[list[int], list[int], int]], rows: list[list[int]], **values) -> dict[str, np.ndarray]:
    """Packed rows of pairs of documents, given with the lengths of their prompts."""
    names = ("tokens", "targets", "segment_ids", "positions")
    batch = {name: np.zeros((len(rows), 3 * LENGTH), np.int32) for name in names}
    batch["loss_mask"] = np.zeros((len(rows), 3 * LENGTH), bool)
    batch |= {name: np.zeros((len(rows), 3 * LENGTH), np.asarray(found).dtype) for name, found in values.items()}
    for row, members in enumerate(rows):
        start, segment = 0, 0
        for index in members:
            first, second, prompt = pairs[index]
            for ids in (first, second):
                at, segment = slice(start, start + len(ids)), segment + 1
                batch["tokens"][row, at] = ids
                batch["targets"][row, start : start + len(ids) - 1] = ids[1:]
                batch["loss_mask"][row, start + prompt - 1 : start + len(ids) - 1] = True
                batch["segment_ids"][row, at] = segment
                batch["positions"][row, at] = range(len(ids))
                for name, found in values.items():
                    batch[name][row, at] = found[index]
                start += len(ids)
    return batch


def step_of(settings: PreferenceConfig) -> StepConfig:
    return StepConfig(NetworkConfig(SPEC), objective=preference_objective(settings))


def ours(settings: PreferenceConfig, base, adapters, batch, micro_batch: int = 1):
    run = jax.jit(loss_and_gradients, static_argnums=0)
    return run(step_of(settings), adapters, base, to_device(in_steps(batch, micro_batch)), jnp.int32(0))


def as_jax(model) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value) for name, value in adapters_of(model, SPEC).items()}


def theirs(trainer) -> tuple[float, dict[str, float]]:
    """The loss of the first batch with its gradients, and the metrics that the trainer logs."""
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    metrics = getattr(trainer, "_metrics", None) or trainer._stored_metrics
    return float(loss), {name: float(np.mean(values)) for name, values in metrics["train"].items()}


def compare(trainer, settings, base, adapters, batch, names=("chosen", "rejected")) -> None:
    expected, metrics = theirs(trainer)
    loss, scalars, gradients = ours(settings, base, adapters, batch)
    assert float(loss) == pytest.approx(expected, abs=1e-5)
    for name in names:
        if isinstance(settings, DpoConfig | KtoConfig):
            assert float(scalars[f"logps/{name}"]) == pytest.approx(metrics[f"logps/{name}"], abs=1e-4)
        assert float(scalars[f"rewards/{name}"]) == pytest.approx(metrics[f"rewards/{name}"], abs=1e-4)
    if "rewards/accuracies" in metrics:
        assert float(scalars["rewards/accuracy"]) == pytest.approx(metrics["rewards/accuracies"])
    for name, value in adapters_of(trainer.model, SPEC, gradients=True).items():
        assert relative_error(gradients[name], value) < 1e-4, name


ROWS = [[0, 1, 2], [3], [4, 5], []]
DPO = {
    "sigmoid": ({}, {"loss_type": ["sigmoid"]}),
    "hinge": ({"loss": "hinge", "beta": 0.5}, {"loss_type": ["hinge"], "beta": 0.5}),
    "ipo": ({"loss": "ipo"}, {"loss_type": ["ipo"]}),
    "robust": ({"loss": "robust", "label_smoothing": 0.1}, {"loss_type": ["robust"], "label_smoothing": 0.1}),
    "with sft": ({"sft_weight": 0.3}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]}),
}


def pairs_of(trainer) -> list[tuple[list[int], list[int], int]]:
    return [
        (one["prompt_ids"] + one["chosen_ids"], one["prompt_ids"] + one["rejected_ids"], len(one["prompt_ids"]))
        for one in trainer.train_dataset
    ]


NORMAL = ("with sft",)
"""The others differ from it in one line, and each trainer takes seconds to make."""


@pytest.mark.parametrize("loss", [one if one in NORMAL else pytest.param(one, marks=pytest.mark.slow) for one in DPO])
def test_dpo(loss, tokenizer, tmp_path):
    """The reference is a frozen copy of the first adapter, as in TRL for a model that has one already."""
    mine, arguments = DPO[loss]
    base = from_torch(torch_llama(SMALL), SMALL)
    model = peft_model(torch_llama(SMALL), LORA, seed=4)
    trainer = trainer_of(trl.DPOTrainer, trl.DPOConfig, model, records(), tokenizer, tmp_path, **arguments)
    frozen = {REFERENCE + path: value for path, value in as_jax(model).items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05)
    settings = DpoConfig(name="dpo", reference={"adapter": "first"}, **mine)
    compare(trainer, settings, base | frozen, as_jax(model), rows_of(pairs_of(trainer), ROWS))


@pytest.mark.slow
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cpo_is_dpo_without_a_reference(smoothing, tokenizer, tmp_path):
    arguments = {"loss_type": "sigmoid", "label_smoothing": smoothing, "cpo_alpha": 0.5}
    settings = DpoConfig(name="dpo", reference="none", label_smoothing=smoothing, sft_weight=0.5)
    check_without_reference(CPOTrainer, CPOConfig, settings, tokenizer, tmp_path, **arguments)


@pytest.mark.slow
def test_simpo(tokenizer, tmp_path):
    arguments = {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0}
    check_without_reference(CPOTrainer, CPOConfig, SimpoConfig(name="simpo"), tokenizer, tmp_path, **arguments)


@pytest.mark.slow
def test_orpo(tokenizer, tmp_path):
    settings = OrpoConfig(name="orpo", sft_on="all")
    check_without_reference(ORPOTrainer, ORPOConfig, settings, tokenizer, tmp_path)


def check_without_reference(kind, config, settings, tokenizer, directory, **arguments) -> None:
    arguments |= {"remove_unused_columns": False, "disable_dropout": True}
    base = from_torch(torch_llama(SMALL), SMALL)
    model = peft_model(torch_llama(SMALL), LORA)
    trainer = trainer_of(kind, config, model, records(), tokenizer, directory, **arguments)
    pairs = [
        (one["chosen_input_ids"], one["rejected_input_ids"], one["chosen_labels"].count(-100))
        for one in trainer.train_dataset
    ]
    compare(trainer, settings, base, as_jax(model), rows_of(pairs, ROWS))


def test_kto(tokenizer, tmp_path):
    base = from_torch(torch_llama(SMALL), SMALL)
    data = [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 3 > 0} for i, r in enumerate(records())]
    import peft

    lora = peft.LoraConfig(r=4, lora_alpha=12, target_modules=list(LORA.targets), task_type="CAUSAL_LM")
    import datasets

    arguments = trl.KTOConfig(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=PAIRS, train_sampling_strategy="sequential", desirable_weight=1.5,
    )  # fmt: skip
    trainer = trl.KTOTrainer(
        torch_llama(SMALL), args=arguments, train_dataset=datasets.Dataset.from_list(data),
        processing_class=tokenizer, peft_config=lora,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    documents = [
        (
            one["prompt_ids"] + one["completion_ids"],
            one["prompt_ids"] + one["KL_completion_ids"],
            len(one["prompt_ids"]),
        )
        for one in trainer.train_dataset
    ]
    batch = rows_of(documents, ROWS, good=[bool(one["label"]) for one in trainer.train_dataset])
    settings = KtoConfig(name="kto", desirable_weight=1.5)
    compare(trainer, settings, base, as_jax(trainer.model), batch)


@pytest.mark.slow
def test_six_steps_of_dpo(tokenizer, tmp_path):
    """AdamW, clipping, four pairs a step; the base is the reference."""
    import peft

    base = from_torch(torch_llama(SMALL), SMALL)
    lora = peft.LoraConfig(r=4, lora_alpha=12, target_modules=list(LORA.targets), task_type="CAUSAL_LM")
    import datasets

    arguments = trl.DPOConfig(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, gradient_checkpointing=False,
        per_device_train_batch_size=4, num_train_epochs=1, logging_steps=1, learning_rate=5e-3, weight_decay=0.01,
        lr_scheduler_type="constant", train_sampling_strategy="sequential", save_strategy="no", max_grad_norm=1.0,
        beta=0.5,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        torch_llama(SMALL), args=arguments, train_dataset=datasets.Dataset.from_list(records(4) * 6),
        processing_class=tokenizer, peft_config=lora,
    )  # fmt: skip
    adapters, pairs = as_jax(trainer.model), pairs_of(trainer)
    trainer.train()
    expected = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    batches = [to_device(in_steps(rows_of(pairs[4 * step : 4 * step + 4], [[0, 1], [2, 3]]), 1)) for step in range(6)]
    settings = DpoConfig(name="dpo", beta=0.5)
    losses, adapters = run_ours(SPEC, base, adapters, batches, 5e-3, preference_objective(settings))
    assert expected[-1] < expected[0] - 0.05, "the trajectory should go somewhere"
    np.testing.assert_allclose(losses, expected, atol=1e-4)
    for name, value in adapters_of(trainer.model, SPEC).items():
        assert relative_error(adapters[name], value) < 1e-2, name  # Adam magnifies rounding of single elements
