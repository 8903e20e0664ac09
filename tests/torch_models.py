"""transformers' models of the test sizes, and their weights in our layout; importers skip without torch."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import ModelSpec, Params
from tests.tiny import SMALL

torch = pytest.importorskip("torch", reason="the parity tests compare against torch")
transformers = pytest.importorskip("transformers")

# Rotary embeddings of configs whose contexts are as small as the test models'.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}


def torch_llama(config: LlamaConfig, seed: int = 0) -> transformers.LlamaForCausalLM:
    """transformers' model of the same sizes, float32, with weights large enough that attention is far from uniform."""
    torch.manual_seed(seed)
    hf = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        initializer_range=0.2,
        attn_implementation="eager",
    )
    return transformers.LlamaForCausalLM(hf).eval().float()


def config_of(model: transformers.LlamaForCausalLM) -> LlamaConfig:
    hf = model.config
    return dataclasses.replace(
        SMALL,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=hf.num_hidden_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=hf.hidden_size // hf.num_attention_heads,
        rms_norm_eps=hf.rms_norm_eps,
        tie_word_embeddings=hf.tie_word_embeddings,
    )


def from_torch(model: torch.nn.Module, config: LlamaConfig) -> Params:
    """Stacks a torch state dict manually, independently of the package's own loader."""
    state = {name: tensor.detach().numpy().copy() for name, tensor in model.state_dict().items()}
    params = {}
    for name in ModelSpec(config).base_shapes:
        if name.startswith("layers/"):
            module = name.removeprefix("layers/").removesuffix("/weight")
            rows = [state[f"model.layers.{i}.{torch_module(module)}.weight"] for i in range(config.num_layers)]
            params[name] = jnp.asarray(np.stack(rows))
        else:
            params[name] = jnp.asarray(state[("" if name.startswith("lm_head") else "model.") + name.replace("/", ".")])
    return params


def torch_module(module: str) -> str:
    if module.endswith("layernorm"):
        return module
    return ("self_attn." if module[0] in "qkvo" else "mlp.") + module
