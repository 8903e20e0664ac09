"""16k tokens on one device: rows of whole conversations with remat and the chunked loss, against PEFT."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flacuna_jax.config.files import parse_config
from flacuna_jax.config.model import LoraConfig
from flacuna_jax.config.run import MeshConfig, RunConfig
from flacuna_jax.data.build import build_store
from flacuna_jax.data.pipeline import StepSource, plan_steps
from flacuna_jax.huggingface import names
from flacuna_jax.huggingface.load import load_base
from flacuna_jax.huggingface.tokenizer import load_tokenizer
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.model.sharding import make_mesh, parameter_shardings
from flacuna_jax.run.model import network_sizes
from flacuna_jax.training.network import NetworkConfig
from flacuna_jax.training.step import StepConfig, loss_and_gradients
from tests.torch_models import torch, transformers

peft = pytest.importorskip("peft")

LENGTH, CONTEXT = 16384, 2048
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
LORA = LoraConfig(rank=4, targets=("q_proj", "v_proj"), dropout=0.0)


def joined(path: Path, tokens: list[int], tokenizer) -> list[dict]:
    """Conversations of almost the given number of tokens, joined from Alpaca's questions and answers."""
    records, made = iter(json.loads(path.read_text(encoding="utf-8"))), []
    for wanted in tokens:
        turns, length = [], 60  # the system text
        while length < wanted - 500:
            record = next(records)
            question, answer = f"{record['instruction']}\n{record['input']}".strip(), record["output"].strip()
            if answer:
                turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
                length += len(tokenizer.encode(question)) + len(tokenizer.encode(answer)) + 10
        made.append({"conversations": turns})
    return made


def torch_loss(model, examples) -> "torch.Tensor":
    """Document by document, with the head in recomputed chunks, because 32,000 × 16k logits are 2 GB."""
    total, supervised = torch.zeros(()), 0
    for example in examples:
        ids = torch.tensor(np.asarray(example.ids, np.int64))
        hidden = model.base_model.model.model(input_ids=ids[None]).last_hidden_state[0, :-1]
        mask = torch.tensor(np.asarray(example.loss_mask))[1:]
        for part, targets in zip(hidden[mask].split(1024), ids[1:][mask].split(1024), strict=True):
            total = total + torch.utils.checkpoint.checkpoint(
                lambda part, targets: torch.nn.functional.cross_entropy(
                    model.base_model.model.lm_head(part), targets, reduction="sum"
                ),
                part,
                targets,
                use_reentrant=False,
            )
        supervised += int(mask.sum())
    return total / supervised


@pytest.mark.slow
def test_a_row_of_16k_has_the_loss_and_gradients_of_peft(
    test_data: Path, llama_tokenizer: Path, tmp_path: Path
) -> None:
    """One document that fills the row, then one row of three: linear scaling of a 2k model, remat full."""
    torch.manual_seed(0)
    sizes = transformers.LlamaConfig(
        vocab_size=32000, **SIZES, num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.2
    )
    transformers.LlamaForCausalLM(sizes).float().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(llama_tokenizer)
    records = joined(test_data / "stanford_alpaca" / "alpaca_5000.json", [LENGTH, 9000, 5000, 2300], tokenizer)
    (tmp_path / "data.json").write_text(json.dumps(records))
    config = settings(tmp_path)
    store, report = build_store(config.data, tokenizer)
    assert len(store) == 4, report.lines()
    plan = plan_steps(store, config.data, config.training, seed=0, shards=1)
    assert (plan.rows, plan.total_steps) == (2, 2)
    assert plan.fill > 0.9

    network = network_sizes(config.model, config.data)
    spec = ModelSpec(network, LORA, "float32", "float32")
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    base = load_base(str(tmp_path), network, parameter_shardings(spec.base, mesh), "float32")

    sizes.rope_parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": LENGTH / CONTEXT}
    stretched = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, config=sizes, attn_implementation="sdpa")
    adapted = peft.LoraConfig(r=4, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"])
    reference = peft.get_peft_model(stretched.float(), adapted)
    adapters = {path: np.zeros(shape, np.float32) for path, shape in spec.lora_shapes.items()}
    for name, parameter in reference.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
            path, layer = names.parse_adapter_name(name, network)  # type: ignore[misc]
            adapters[path][layer] = parameter.detach().numpy()

    gradients_of = jax.jit(loss_and_gradients, static_argnums=0)
    with jax.set_mesh(mesh):
        source = StepSource(store, plan)
        for step in range(plan.total_steps):
            batch = {name: jnp.asarray(leaf) for name, leaf in source[step].items()}
            assert batch["tokens"].shape == (1, 1, LENGTH)
            loss, _, gradients = gradients_of(
                StepConfig(NetworkConfig(spec, remat="full")), adapters, base, batch, jnp.int32(0)
            )
            reference.zero_grad()
            expected = torch_loss(reference, [store.example(index) for index in source.rows(step)[0]])
            expected.backward()
            # float32 sums of 16k terms in another order.
            assert float(loss) == pytest.approx(expected.item(), rel=2e-6)
            for name, parameter in reference.named_parameters():
                if "lora_" in name:
                    path, layer = names.parse_adapter_name(name, network)  # type: ignore[misc]
                    theirs = parameter.grad.numpy()
                    error = np.linalg.norm(gradients[path][layer] - theirs) / np.linalg.norm(theirs)
                    assert error < 1e-3, (name, error)


def settings(directory: Path) -> RunConfig:
    return parse_config(
        {
            "output_dir": str(directory / "run"),
            "model": {"path": str(directory), "dtype": "float32", "rope_scaling": {"type": "linear"}},
            "data": {"sources": ({"path": str(directory / "data.json")},), "max_length": LENGTH},
            "training": {"batch_size": 1, "batch_unit": "rows", "micro_batch_size": 1},
        }
    )
