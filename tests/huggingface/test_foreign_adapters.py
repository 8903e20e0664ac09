"""Adapters as PEFT saves them in all their kinds: our logits and those of the merged model are PEFT's.

float32 on both sides, sums in other orders: logits are O(1) and agree to 1e-4.
"""

import dataclasses
import functools
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.adapter import Adapter, read_adapter
from flacuna_jax.huggingface.architecture import read_architecture
from flacuna_jax.huggingface.deliver import Companions, write_merged
from flacuna_jax.huggingface.files.read import open_checkpoint
from flacuna_jax.huggingface.load import load_base
from flacuna_jax.kernels.packed_mask import make_packed_mask
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.model.sharding import make_mesh, parameter_shardings
from tests.torch_models import torch, transformers

peft = pytest.importorskip("peft")

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "attn_implementation": "eager",
}
BASES = {
    "LLaMA": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "Qwen2": ("Qwen2", {}),
}
TOKENS = np.arange(2 * 9).reshape(2, 9) * 7 % 96
BOTH = {"embed_tokens": [3, 70, 14], "lm_head": [3, 70, 14]}
# Name of the base, settings of PEFT, and of what is done before and at saving.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "equal tables": ("LLaMA", {"save_embedding_layers": True}),
    "changed tables": ("LLaMA", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "embedding": ("LLaMA", {"modules_to_save": ["embed_tokens"]}),
    "embedding of a tied model": ("tied", {"modules_to_save": ["embed_tokens"]}),
    "head of a tied model": ("tied", {"modules_to_save": ["lm_head"]}),
    "tables that stay tied": ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "factors of the embedding": (
        "LLaMA",
        {"target_modules": ["q_proj", "embed_tokens"], "alpha_pattern": {"embed_tokens": 3}},
    ),
    "factors of embedding and head": ("LLaMA", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "factors of a tied embedding": ("tied", {"target_modules": ["q_proj", "embed_tokens"], "use_rslora": True}),
    "factors of a tied head": ("tied", {"target_modules": ["q_proj", "lm_head"]}),
    "larger vocabulary": ("LLaMA", {"resize": 101, "save_embedding_layers": True}),
    "smaller vocabulary": ("LLaMA", {"resize": 90, "save_embedding_layers": True}),
    "larger vocabulary, embedding": (
        "LLaMA",
        {"resize": 101, "modules_to_save": ["embed_tokens"], "save_embedding_layers": True},
    ),
    "larger vocabulary, tied": ("tied", {"resize": 101, "save_embedding_layers": True}),
    "larger vocabulary, tied, rows": (
        "tied",
        {"resize": 101, "save_embedding_layers": True, "trainable_token_indices": [100, 97]},
    ),
    "norms and a projection": ("LLaMA", {"modules_to_save": ["norm", "input_layernorm", "k_proj"]}),
    "rows of the embedding": ("LLaMA", {"trainable_token_indices": [3, 70, 14]}),
    "rows of embedding and head": ("LLaMA", {"trainable_token_indices": BOTH}),
    "rows of a tied table": ("tied", {"trainable_token_indices": [3, 70, 14]}),
    "different rows of a tied table": ("tied", {"trainable_token_indices": {"embed_tokens": [3, 70], "lm_head": [3]}}),
    "rows of the embedding, factors of the head": (
        "LLaMA",
        {"trainable_token_indices": [3, 70], "target_modules": ["q_proj", "lm_head"]},
    ),
    "biases": ("Qwen2", {"bias": "all"}),
    "biases of targets": ("Qwen2", {"bias": "lora_only"}),
    "no biases": ("LLaMA", {"bias": "all"}),
    "excluded by name": (
        "LLaMA",
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj", "no_such"]},
    ),
    "excluded by expression": ("LLaMA", {"target_modules": "all-linear", "exclude_modules": r".*\.1\.mlp\..*"}),
    "a target that matches nothing": ("LLaMA", {"target_modules": ["q_proj", "c_attn"]}),
    "all-linear": ("LLaMA", {"target_modules": "all-linear"}),
    "by expression": ("LLaMA", {"target_modules": r".*layers\.\d\.(self_attn\.q|mlp\.up)_proj"}),
    "a layer": ("LLaMA", {"layers_to_transform": 0, "layers_pattern": "layers"}),
    "a layer without pattern": (
        "LLaMA",
        {"layers_to_transform": [1], "target_modules": ["q_proj", "lm_head", "up_proj"]},
    ),
    "patterns": (
        "LLaMA",
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"1.*v_proj": 9}},
    ),
    "rank-stabilised": ("LLaMA", {"use_rslora": True}),
    "DoRA, norms": ("LLaMA", {"use_dora": True, "modules_to_save": ["norm"]}),
    "gaussian": ("LLaMA", {"init_lora_weights": "gaussian"}),
}
QUICK = (
    "embedding of a tied model",
    "factors of embedding and head",
    "larger vocabulary",
    "larger vocabulary, tied, rows",
    "norms and a projection",
    "rows of embedding and head",
    "different rows of a tied table",
    "biases",
    "excluded by expression",
    "a target that matches nothing",
    "a layer without pattern",
)
"""The kinds that the quick suite has."""
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "PiSSA": ("LLaMA", {"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'.*path_initial_model"),
    "OLoRA": ("LLaMA", {"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    "biases of factors": ("LLaMA", {"lora_bias": True}, "lora_bias is True"),
    "DoRA of the head": (
        "LLaMA",
        {"use_dora": True, "target_modules": ["q_proj", "lm_head"]},
        "use_dora with lm_head among its targets",
    ),
    "DoRA of some": (
        "LLaMA",
        {"use_dora": True, "target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
        "with DoRA",
    ),
    "one resized table": (
        "LLaMA",
        {"resize": 101, "modules_to_save": ["embed_tokens"], "save_embedding_layers": False},
        "no other table of that size",
    ),
    "rows of some new tokens": (
        "LLaMA",
        {"resize": 101, "trainable_token_indices": [98], "save_embedding_layers": False},
        "goes up to 98, but the base has 96 rows",
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    written = {}
    for name, (kind, settings) in BASES.items():
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**SIZES, **settings)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
        written[name] = tmp_path_factory.mktemp("base")
        model.save_pretrained(written[name])
    return written


def by_peft(base: Path, path: Path, settings: dict[str, Any]) -> np.ndarray:
    """Saves an adapter of PEFT whose trained parameters are all changed, and returns PEFT's logits with it."""
    model = reference(base)
    settings = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | settings
    save = settings.pop("save_embedding_layers", "auto")
    if size := settings.pop("resize", None):
        model.resize_token_embeddings(size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        adapted.save_pretrained(path, save_embedding_layers=save)
    return torch_logits(adapted)


def reference(base: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager").eval()


def torch_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS % model.config.vocab_size)).logits.numpy()


def our_logits(base: Path, adapter: Adapter) -> np.ndarray:
    """As `generate` computes them."""
    config = adapter.spec.config
    shardings = parameter_shardings(ModelSpec(config).base, make_mesh("auto", jax.devices()[:1]))
    params = load_base(adapter.base(open_checkpoint(base)), config, shardings, "float32")
    spec = dataclasses.replace(adapter.spec, dtype="float32", param_dtype="float32")
    return np.asarray(compiled(spec)({**params, **adapter.params}))


@functools.cache
def compiled(spec: ModelSpec) -> Any:
    @jax.jit
    def logits(params: dict[str, jax.Array]) -> jax.Array:
        model, tokens = spec.merge(params), jnp.asarray(TOKENS % spec.config.vocab_size)
        return model.logits(model(tokens, jnp.tile(jnp.arange(9), (2, 1)), make_packed_mask(jnp.ones_like(tokens))))

    return logits


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_logits_and_merged_model_equal_those_of_peft(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base, settings = bases[KINDS[kind][0]], KINDS[kind][1]
    theirs = by_peft(base, tmp_path / "adapter", dict(settings))
    reader = open_checkpoint(base)
    adapter = read_adapter(tmp_path / "adapter", read_architecture(base), reader)
    np.testing.assert_allclose(our_logits(base, adapter), theirs, atol=1e-4, rtol=1e-4)
    if theirs.shape[-1] == SIZES["vocab_size"]:
        assert np.abs(theirs - torch_logits(reference(base))).max() > 0.1

    config = adapter.spec.config
    write_merged(tmp_path / "merged", adapter.base(reader), config, adapter, Companions(base, None, {}))
    assert read_architecture(tmp_path / "merged") == config
    np.testing.assert_allclose(torch_logits(reference(tmp_path / "merged")), theirs, atol=1e-4, rtol=1e-4)


def test_tables_equal_to_those_of_the_base_are_dropped(bases: dict[str, Path], tmp_path: Path) -> None:
    by_peft(bases["tied"], tmp_path, {"save_embedding_layers": True})
    config = read_architecture(bases["tied"])
    assert read_adapter(tmp_path, config, open_checkpoint(bases["tied"])).changes is None


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_supported_is_named(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    name, settings, message = REFUSED[kind]
    by_peft(bases[name], tmp_path, dict(settings))
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path, read_architecture(bases[name]), open_checkpoint(bases[name]))
