"""Trained rows of tables against PEFT's trainable_token_indices, float32: loss, gradients, steps, files."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.config.run import MeshConfig
from flacuna_jax.huggingface.adapter import Adapter, read_adapter
from flacuna_jax.huggingface.deliver import write_adapter
from flacuna_jax.huggingface.names import parse_adapter_name
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import ModelSpec, Params, fresh_adapters
from flacuna_jax.model.sharding import make_mesh, parameter_shardings
from flacuna_jax.model.token_rows import TrainedTokens
from flacuna_jax.training.network import NetworkConfig
from flacuna_jax.training.step import StepConfig, loss_and_gradients
from tests.tiny import SMALL, in_steps, packed_batch, to_device
from tests.torch_models import from_torch, torch, torch_llama
from tests.training.test_step_against_peft import DOCUMENTS, LENGTH, ROWS, run_ours, run_torch, torch_loss

peft = pytest.importorskip("peft")

IDS = (3, 90, 14, 40, 61)
SIZES = dataclasses.replace(SMALL, vocab_size=100, num_layers=2)
CONFIGS = {"untied": SIZES, "tied": dataclasses.replace(SIZES, tie_word_embeddings=True)}
LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.0)


def spec_of(config: LlamaConfig) -> ModelSpec:
    tokens = TrainedTokens.everywhere(IDS, config.tie_word_embeddings)
    return ModelSpec(config, LORA, "float32", "float32", tokens=tokens)


def by_peft(config: LlamaConfig) -> Any:
    """PEFT's model with the same settings, its trained parameters changed from their initial values."""
    indices = list(IDS) if config.tie_word_embeddings else {"embed_tokens": list(IDS), "lm_head": list(IDS)}
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=8.0,
        target_modules=["q_proj", "v_proj"],
        trainable_token_indices=indices,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(torch_llama(config), settings)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def adapters_of(model: Any, spec: ModelSpec, gradients: bool = False) -> Params:
    """PEFT's tensors, or their gradients, in our layout."""
    params = {path: np.zeros(shape, np.float32) for path, shape in spec.lora_shapes.items()}
    for name, parameter in model.named_parameters():
        value = (parameter.grad if gradients else parameter.detach()).numpy() if parameter.requires_grad else None
        if "trainable_tokens_delta" in name:
            params[f"{'lm_head' if 'lm_head' in name else 'embed_tokens'}/token_rows/rows"] = value
        elif "lora_" in name:
            path, layer = parse_adapter_name(name, spec.config)  # type: ignore[misc]
            params[path][layer] = value
    return {path: jnp.array(value) for path, value in params.items()}


@pytest.mark.parametrize(
    "mesh",
    [pytest.param(MeshConfig(), marks=pytest.mark.slow), MeshConfig(fsdp=2, tensor=2)],
    ids=["one device", "four devices"],
)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_loss_and_gradients_equal_those_of_peft(config: LlamaConfig, mesh: MeshConfig) -> None:
    reference, spec, devices = by_peft(config), spec_of(config), make_mesh(mesh)
    documents = [DOCUMENTS[index] for row in ROWS for index in row]
    assert {token for ids in documents for token in ids} & set(IDS), "some trained tokens are looked up"
    expected = torch_loss(reference, documents)
    expected.backward()
    base = jax.device_put(from_torch(torch_llama(config), config), parameter_shardings(spec.base, devices))
    batch = to_device(in_steps(packed_batch(DOCUMENTS, [*ROWS, [], []], LENGTH), 4))
    with jax.set_mesh(devices):
        loss, _, gradients = jax.jit(loss_and_gradients, static_argnums=0)(
            StepConfig(NetworkConfig(spec)), adapters_of(reference, spec), base, batch, jnp.int32(0)
        )
    assert float(loss) == pytest.approx(expected.item(), abs=1e-5)
    for path, value in adapters_of(reference, spec, gradients=True).items():
        error = np.linalg.norm(gradients[path] - value) / np.linalg.norm(value)
        assert error < 1e-4, (path, error)  # float32 sums in another order
    trained = sum(parameter.numel() for parameter in reference.parameters() if parameter.requires_grad)
    assert spec.trainable_count == trained


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_twelve_steps_and_files_equal_those_of_peft(config: LlamaConfig, tmp_path: Path) -> None:
    """AdamW with weight decay and clipping; then the adapter in PEFT, and PEFT's adapter here."""
    reference, spec = by_peft(config), spec_of(config)
    base, documents = from_torch(torch_llama(config), config), [DOCUMENTS[index] for row in ROWS for index in row]
    adapters = adapters_of(reference, spec)
    batch = to_device(in_steps(packed_batch(DOCUMENTS, ROWS, LENGTH), 2))
    losses, adapters = run_ours(spec, base, adapters, [batch] * 12, 5e-3)
    expected = run_torch(reference, [documents] * 12, 5e-3)
    assert expected[-1] < expected[0] - 0.05
    np.testing.assert_allclose(losses, expected, atol=2e-4)
    for path, value in adapters_of(reference, spec).items():
        # AdamW divides by gradients, so the last bits of float32 matter for those near zero.
        assert np.linalg.norm(adapters[path] - value) < 1e-2 * np.linalg.norm(value), path

    settings = {"lora": LORA, "dtype": "bfloat16", "param_dtype": "bfloat16"}
    ours = Adapter(dataclasses.replace(spec, **settings), {path: np.asarray(v) for path, v in adapters.items()}, "base")
    write_adapter(tmp_path / "ours", ours, config, trained=True)
    loaded = peft.PeftModel.from_pretrained(torch_llama(config), tmp_path / "ours", is_trainable=True)
    for path, value in adapters_of(loaded, spec).items():
        np.testing.assert_array_equal(value, adapters[path], err_msg=path)
    reference.save_pretrained(tmp_path / "theirs")
    found = read_adapter(tmp_path / "theirs", config)
    assert (found.spec.tokens, found.changes) == (spec.tokens, None)
    for path, value in adapters_of(reference, spec).items():
        np.testing.assert_array_equal(found.params[path], value, err_msg=path)


def test_new_rows_begin_as_those_of_the_table() -> None:
    for config in CONFIGS.values():
        spec, base = spec_of(config), from_torch(torch_llama(config), config)
        adapters = fresh_adapters(spec, base, 0, make_mesh(MeshConfig()))
        for table, (path, ids) in spec.token_rows.items():
            np.testing.assert_array_equal(adapters[path], base[table][jnp.array(ids)])
