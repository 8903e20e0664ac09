import dataclasses

import pytest

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.config.types import PROJECTIONS
from flacuna_jax.huggingface import names
from flacuna_jax.model.parameters import ModelSpec
from tests.tiny import SMALL
from tests.torch_models import torch_llama

peft = pytest.importorskip("peft")


def test_names_of_base_tensors_map_both_ways() -> None:
    state = torch_llama(SMALL).state_dict()
    base = ModelSpec(SMALL).base
    assert {name for parameter in base.values() for name in parameter.tensors} == set(state)
    for name in state:
        path, layer = names.parse_tensor_name(name, SMALL)
        assert base[path].tensor(layer) == name


def test_names_of_adapter_tensors_map_both_ways() -> None:
    config = peft.LoraConfig(r=3, target_modules=list(PROJECTIONS), task_type="CAUSAL_LM")
    theirs = peft.get_peft_model_state_dict(peft.get_peft_model(torch_llama(SMALL), config))
    adapters = ModelSpec(SMALL, LoraConfig(rank=3, targets=PROJECTIONS)).adapters
    ours = {names.adapter_name(part, layer): part.layer_shape for part in adapters.values() for layer in part.layers}
    assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    for name in theirs:
        path, layer = names.parse_adapter_name(name, SMALL)
        assert names.adapter_name(adapters[path], layer) == name
        assert names.parse_adapter_name(name.replace(".weight", ".default.weight"), SMALL) == (path, layer)


def test_the_paper_has_160_adapter_tensors() -> None:
    adapters = ModelSpec(dataclasses.replace(SMALL, num_layers=40), LoraConfig()).adapters.values()
    assert len({names.adapter_name(part, layer) for part in adapters for layer in part.layers}) == 160


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.input_layernorm.bias",
        "model.layers.00.self_attn.q_proj.weight",
        "model.layers.-1.self_attn.q_proj.weight",
        "layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.qkv_proj.weight",
        "transformer.wte.weight",
    ],
)
def test_other_names_are_unknown(name: str) -> None:
    assert names.parse_tensor_name(name, SMALL) is None


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_bias_vector",
        "base_model.model.model.embed_tokens.lora_A.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.layers.0.input_layernorm.lora_A.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
    ],
)
def test_other_adapter_names_are_unknown(name: str) -> None:
    assert names.parse_adapter_name(name, SMALL) is None


def test_only_rotary_frequencies_are_ignored() -> None:
    assert names.is_ignored("model.layers.39.self_attn.rotary_emb.inv_freq")
    assert not names.is_ignored("model.layers.39.self_attn.q_proj.weight")
    assert torch_llama(SMALL).state_dict().keys().isdisjoint({"model.rotary_emb.inv_freq"})
