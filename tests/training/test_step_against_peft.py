"""Adapters, gradients and a whole AdamW trajectory against PEFT and torch, float32, dropout off."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.config.run import MeshConfig
from flacuna_jax.config.types import PROJECTIONS
from flacuna_jax.model.parameters import ModelSpec, Params
from flacuna_jax.model.sharding import make_mesh, parameter_shardings
from flacuna_jax.training.network import NetworkConfig
from flacuna_jax.training.objective import SUPERVISED_TOKENS, Objective
from flacuna_jax.training.step import StepConfig, loss_and_gradients, make_step
from tests.tiny import SMALL, in_steps, packed_batch, to_device
from tests.torch_models import config_of, from_torch, torch, torch_llama, torch_module, transformers

peft = pytest.importorskip("peft")

LENGTH = 24
RNG = np.random.default_rng(7)
DOCUMENTS = [RNG.integers(1, SMALL.vocab_size, size).tolist() for size in (9, 14, 5, 20, 11, 7, 12, 3)]
ROWS = [[0, 1], [2], [3], [4, 5], [6], [7]]


def peft_model(base: "torch.nn.Module", lora: LoraConfig, seed: int = 3) -> "peft.PeftModel":
    """PEFT's model with both adapter matrices random, so that no gradient is zero."""
    settings = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=list(lora.targets), task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, settings)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def peft_name(name: str, layer: int) -> str:
    module, leaf = name.removeprefix("layers/").split("/")
    matrix = {"lora_a": "lora_A", "lora_b": "lora_B"}[leaf]
    return f"base_model.model.model.layers.{layer}.{torch_module(module)}.{matrix}.default.weight"


def adapters_of(model: "peft.PeftModel", spec: ModelSpec, gradients: bool = False) -> dict[str, np.ndarray]:
    tensors = dict(model.named_parameters())
    pick = (lambda t: t.grad) if gradients else (lambda t: t.detach())
    layers = range(spec.config.num_layers)
    return {
        name: np.stack([pick(tensors[peft_name(name, layer)]).numpy().copy() for layer in layers])
        for name in spec.lora_shapes
    }


def torch_loss(model: "torch.nn.Module", documents: list[list[int]]) -> "torch.Tensor":
    """Sum over separate, unpadded documents, divided once by the number of supervised tokens."""
    total, count = torch.zeros(()), 0
    for ids in documents:
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
        count += len(ids) - 1
    return total / count


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(actual) - expected) / np.linalg.norm(expected))


def spec_for(config, lora: LoraConfig) -> ModelSpec:
    return ModelSpec(config, lora, "float32", "float32")


def documents_in(rows: list[list[int]]) -> list[list[int]]:
    return [DOCUMENTS[index] for row in rows for index in row]


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), PROJECTIONS], ids=["q,v", "all"])
def test_packed_gradients_equal_pefts_on_single_documents(targets):
    lora = LoraConfig(rank=4, alpha=12.0, dropout=0.0, targets=targets)
    reference = peft_model(torch_llama(SMALL), lora)
    spec = spec_for(SMALL, lora)
    base = from_torch(torch_llama(SMALL), SMALL)
    adapters = {name: jnp.asarray(value) for name, value in adapters_of(reference, spec).items()}

    expected_loss = torch_loss(reference, documents_in(ROWS))
    expected_loss.backward()
    batch = to_device(in_steps(packed_batch(DOCUMENTS, ROWS, LENGTH), 2))
    loss, _, gradients = jax.jit(loss_and_gradients, static_argnums=0)(
        StepConfig(NetworkConfig(spec)), adapters, base, batch, jnp.int32(0)
    )

    assert float(loss) == pytest.approx(expected_loss.item(), abs=1e-5)
    for name, expected in adapters_of(reference, spec, gradients=True).items():
        assert relative_error(gradients[name], expected) < 1e-4, name


def run_torch(model: "peft.PeftModel", batches: list[list[list[int]]], rate: float) -> list[float]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    losses = []
    for documents in batches:
        optimizer.zero_grad()
        loss = torch_loss(model, documents)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def run_ours(
    spec: ModelSpec,
    base: Params,
    adapters: Params,
    batches: list[dict[str, jax.Array]],
    rate: float,
    objective: Objective = SUPERVISED_TOKENS,
) -> tuple[list[float], Params]:
    mesh = make_mesh(MeshConfig())
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, 0.9, 0.999, 1e-8, weight_decay=0.01))
    opt_state = optimizer.init(adapters)
    shardings = (
        parameter_shardings(spec.adapters, mesh),
        jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), opt_state),
    )
    step = make_step(StepConfig(NetworkConfig(spec), objective=objective), optimizer, mesh, shardings)
    losses = []
    for index, batch in enumerate(batches):
        adapters, opt_state, metrics = step(adapters, opt_state, base, batch, np.int32(index))
        losses.append(float(metrics.loss))
    return losses, adapters


def check_trajectory(torch_base: "torch.nn.Module", config, length: int, batches: list[list[list[int]]]) -> None:
    lora = LoraConfig(rank=8, alpha=16.0, dropout=0.0)
    base = from_torch(torch_base, config)
    reference = peft_model(torch_base, lora)
    spec = spec_for(config, lora)
    adapters = {name: jnp.asarray(value) for name, value in adapters_of(reference, spec).items()}
    before = {name: np.asarray(value) for name, value in base.items()}

    rate = 5e-3
    expected = run_torch(reference, batches, rate)
    ours = [
        to_device(in_steps(packed_batch(documents, [[i] for i in range(len(documents))], length), 2))
        for documents in batches
    ]
    losses, adapters = run_ours(spec, base, adapters, ours, rate)

    assert expected[-1] < expected[0] - 0.05, "the trajectory should go somewhere"
    np.testing.assert_allclose(losses, expected, atol=1e-4)
    # Adam divides by the root of tiny second moments, which magnifies rounding in single elements: compared as a whole.
    for name, value in adapters_of(reference, spec).items():
        assert relative_error(adapters[name], value) < 1e-2, name
    for name, value in base.items():
        np.testing.assert_array_equal(np.asarray(value), before[name], err_msg=name)


def test_twelve_adamw_steps_with_clipping_equal_peft_and_torch():
    rng = np.random.default_rng(11)
    repeated = rng.integers(1, SMALL.vocab_size, 10).tolist()
    batches = [[[*repeated, *rng.integers(1, SMALL.vocab_size, 4).tolist()] for _ in range(4)] for _ in range(12)]
    check_trajectory(torch_llama(SMALL), SMALL, LENGTH, batches)


def test_twelve_steps_on_the_trained_story_model(story_llama):
    model = transformers.LlamaForCausalLM.from_pretrained(story_llama, dtype=torch.float32)
    rng = np.random.default_rng(5)
    batches = [[rng.integers(3, 2000, 16).tolist() for _ in range(4)] for _ in range(12)]
    repeated = batches[0]
    check_trajectory(model, config_of(model), LENGTH, [repeated] * 12)
