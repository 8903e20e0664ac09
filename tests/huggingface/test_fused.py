"""Fused projections (Phi-3) against PEFT: adapters of both kinds. Weights are in tests/model/test_family.py.

float32 on both sides, sums in other orders: logits are O(1) and agree to 1e-4.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.adapter import Adapter, read_adapter
from flacuna_jax.huggingface.architecture import read_architecture
from flacuna_jax.huggingface.deliver import write_adapter
from flacuna_jax.huggingface.files.read import open_checkpoint
from flacuna_jax.huggingface.files.safetensors_file import read_header
from flacuna_jax.huggingface.load import load_base
from flacuna_jax.huggingface.probe import stored_weights, streamed_logits
from flacuna_jax.huggingface.vllm_rules import vllm_violations
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.model.sharding import make_mesh, parameter_shardings
from flacuna_jax.training.network import NetworkConfig
from flacuna_jax.training.step import StepConfig, loss_and_gradients
from tests.tiny import in_steps, packed_batch, to_device
from tests.torch_models import torch, transformers
from tests.training.test_step_against_peft import torch_loss

peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.numpy")

IDS = np.random.default_rng(0).integers(3, 97, 24).astype(np.int32)
FUSED = ("qkv_proj", "gate_up_proj")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    directory = tmp_path_factory.mktemp("phi")
    transformers.Phi3ForCausalLM(config).eval().save_pretrained(directory)
    return directory


def reference(path: Path) -> "transformers.PreTrainedModel":
    return transformers.AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype="float32")


def with_peft(path: Path, **settings: object) -> "peft.PeftModel":
    """An adapter of PEFT with random factors."""
    model = peft.get_peft_model(reference(path), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            with torch.no_grad():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def logits_of(model: "torch.nn.Module") -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(IDS[None].astype(np.int64))).logits[0].numpy()


def our_logits(path: Path, adapter: Adapter) -> np.ndarray:
    config = read_architecture(path)
    return streamed_logits(stored_weights(open_checkpoint(path), config), config, IDS, adapter)


def random_adapter(path: Path, **settings: object) -> Adapter:
    spec = ModelSpec(read_architecture(path), LoraConfig(**settings))
    rng = np.random.default_rng(1)
    params = {name: (0.1 * rng.standard_normal(shape)).astype(np.float32) for name, shape in spec.lora_shapes.items()}
    for name, value in params.items():
        if spec.adapters[name].stacked:
            value[spec.ranks[name.rpartition("/")[0]].ranks == 0] = 0
    return Adapter(spec, params)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj"]},
        {"r": 4, "lora_alpha": 8, "target_modules": [*FUSED, "o_proj"], "rank_pattern": {"gate_up_proj": 6}},
        pytest.param({"r": 4, "lora_alpha": 8, "target_modules": [*FUSED], "use_dora": True}, marks=pytest.mark.slow),
    ],
    ids=["one", "ranks", "DoRA"],
)
def test_an_adapter_of_peft_is_read_and_written_unchanged(settings: dict, path: Path, tmp_path: Path) -> None:
    model = with_peft(path, **settings)
    model.save_pretrained(tmp_path / "theirs")
    config = read_architecture(path)
    adapter = read_adapter(tmp_path / "theirs", config)
    np.testing.assert_allclose(our_logits(path, adapter), logits_of(model), atol=1e-4, rtol=1e-4)

    write_adapter(tmp_path / "ours", adapter, config, trained=True)
    theirs, ours = (safetensors.load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert set(written["target_modules"]) == set(settings["target_modules"])


def test_a_whole_fused_matrix_replaces_those_of_its_modules(path: Path, tmp_path: Path) -> None:
    model = with_peft(path, r=4, target_modules=["qkv_proj"], modules_to_save=["gate_up_proj"])
    model.save_pretrained(tmp_path)
    config, base = read_architecture(path), open_checkpoint(path)
    adapter = read_adapter(tmp_path, config, base)
    ours = streamed_logits(stored_weights(adapter.base(base), config), config, IDS, adapter)
    np.testing.assert_allclose(ours, logits_of(model), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 8, "alpha": 16.0},
        {"rank": 3, "alpha": 10.0, "targets": "all-linear", "use_rslora": True},
        {"rank": 3, "alpha": 6.0, "targets": ("v_proj", "up_proj"), "layers_to_transform": (1,)},
        pytest.param({"rank": 3, "alpha": 6.0, "targets": "all-linear", "use_dora": True}, marks=pytest.mark.slow),
    ],
    ids=["q and v", "all", "one of each", "DoRA"],
)
def test_our_adapter_is_the_same_function_in_peft(settings: dict, path: Path, tmp_path: Path) -> None:
    adapter = random_adapter(path, **settings)
    write_adapter(tmp_path / "adapter", adapter, read_architecture(path), trained=True)
    model = peft.PeftModel.from_pretrained(reference(path), tmp_path / "adapter").eval()
    np.testing.assert_allclose(our_logits(path, adapter), logits_of(model), atol=1e-4, rtol=1e-4)
    again = read_adapter(tmp_path / "adapter", read_architecture(path))
    assert set(again.lora.targets) == set(adapter.lora.targets)
    if settings == {"rank": 8, "alpha": 16.0}:  # the size of all its modules is the same
        assert vllm_violations(tmp_path / "adapter") == []
        assert again.lora.model_copy(update={"dropout": 0.05}) == adapter.lora


@pytest.mark.slow
def test_gradients_of_a_fused_a_are_the_sums_over_its_modules(path: Path, tmp_path: Path) -> None:
    """PEFT's A is shared: its gradient is that of q's, k's and v's A together. B's rows have the same gradients."""
    model = with_peft(path, r=4, lora_alpha=8, target_modules=["qkv_proj"])
    model.save_pretrained(tmp_path / "adapter")
    adapter = read_adapter(tmp_path / "adapter", read_architecture(path))
    spec = dataclasses.replace(adapter.spec, dtype="float32", param_dtype="float32")
    mesh = make_mesh("auto", jax.devices()[:1])
    base = load_base(str(path), spec.config, parameter_shardings(spec.base, mesh), "float32")
    documents = [IDS[:9].tolist(), IDS.tolist()]
    batch = to_device(in_steps(packed_batch(documents, [[0, 1], []], 40), 1))
    params = {name: jnp.asarray(value) for name, value in adapter.params.items()}
    _, _, ours = jax.jit(loss_and_gradients, static_argnums=0)(
        StepConfig(NetworkConfig(spec)), params, base, batch, jnp.int32(0)
    )
    torch_loss(model, documents).backward()
    modules = [f"layers/{name}" for name in ("q_proj", "k_proj", "v_proj")]
    for layer in range(2):
        theirs = model.base_model.model.model.layers[layer].self_attn.qkv_proj
        a, b = (getattr(theirs, f"lora_{part}").default.weight.grad.numpy() for part in "AB")
        found_a = sum(np.asarray(ours[f"{module}/lora_a"][layer]) for module in modules)
        found_b = np.concatenate([ours[f"{module}/lora_b"][layer] for module in modules])
        assert np.linalg.norm(found_a - a) < 1e-4 * np.linalg.norm(a)
        assert np.linalg.norm(found_b - b) < 1e-4 * np.linalg.norm(b)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"targets": "all-linear", "alpha_pattern": {"q_proj": 2.0}}, "qkv_proj: the modules in it have different"),
        ({"targets": ("q_proj", "v_proj"), "use_dora": True}, "with DoRA, all modules in it must be targets"),
    ],
)
def test_what_peft_cannot_represent_is_refused(settings: dict, says: str, path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        write_adapter(tmp_path / "adapter", random_adapter(path, **settings), read_architecture(path), trained=True)


def test_a_missing_or_misshapen_matrix_is_named_as_in_the_file(path: Path, tmp_path: Path) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((path / file).read_bytes())
    name = "model.layers.1.self_attn.qkv_proj.weight"
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    assert name in read_header(tmp_path / "model.safetensors")[0]
    safetensors.save_file({**tensors, name: tensors[name][:-1]}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"{name} has shape \[95, 48\], but config.json gives 96 rows"):
        open_checkpoint(tmp_path)
    del tensors[name]
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    config = read_architecture(tmp_path)
    with pytest.raises(UserError, match=f"1 missing: {name}"):
        stored_weights(open_checkpoint(tmp_path), config)
