"""Written adapters are loaded by PEFT without a warning; adapters of PEFT are read in all variants."""

import dataclasses
import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.config.types import PROJECTIONS
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.adapter import Adapter, read_adapter
from flacuna_jax.huggingface.card import Facts, Measured
from flacuna_jax.huggingface.deliver import write_adapter
from flacuna_jax.huggingface.verify import VerificationError
from flacuna_jax.kernels.packed_mask import make_packed_mask
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import ModelSpec
from tests.huggingface.checkpoints import GROUPED, SMALL, Written
from tests.torch_models import from_torch, torch, torch_llama

peft = pytest.importorskip("peft")
files = pytest.importorskip("safetensors.torch")

TOKENS = np.arange(2 * 11).reshape(2, 11) * 7 % 61


def random_adapter(config: LlamaConfig, lora: LoraConfig, base_name: str | None = None, seed: int = 0) -> Adapter:
    """Random numbers within each layer's rank; magnitudes around the norms of the test models' rows."""
    rng = np.random.default_rng(seed)
    params = {}
    for path, shape in ModelSpec(config, lora).lora_shapes.items():
        params[path] = (0.3 * rng.standard_normal(shape) + path.endswith("magnitude")).astype(np.float32)
    for module, (ranks, _) in ModelSpec(config, lora).ranks.items():
        for layer, rank in enumerate(ranks if module != "lm_head" else ()):
            params[f"{module}/lora_a"][layer, rank:] = 0
            params[f"{module}/lora_b"][layer, :, rank:] = 0
            if lora.use_dora and not rank:
                params[f"{module}/lora_magnitude"][layer] = 0
    return Adapter(ModelSpec(config, lora), params, base_name)


def our_logits(written: Written, adapter: Adapter | None) -> np.ndarray:
    params = from_torch(written.model.float(), written.config) | dict(adapter.params if adapter else {})
    apply = compiled(ModelSpec(written.config, None if adapter is None else adapter.lora, "float32", "float32"))
    return np.asarray(apply({path: jnp.asarray(value) for path, value in params.items()}))


@functools.cache
def compiled(spec: ModelSpec) -> Callable[[dict[str, jax.Array]], jax.Array]:
    @jax.jit
    def logits(params: dict[str, jax.Array]) -> jax.Array:
        model = spec.merge(params)
        mask = make_packed_mask(jnp.ones(TOKENS.shape, jnp.int32))
        return model.logits(model(jnp.asarray(TOKENS), jnp.tile(jnp.arange(11), (2, 1)), mask))

    return logits


def peft_logits(written: Written, path: Path) -> np.ndarray:
    """Logits of PEFT with the adapter on a fresh copy of the base; any warning is an error."""
    base = torch_llama(written.config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = peft.PeftModel.from_pretrained(base, path).eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


LORAS = {
    "paper": LoraConfig(),
    "all, odd rank": LoraConfig(rank=3, alpha=7.0, dropout=0.0, targets=PROJECTIONS),
    "feed-forward": LoraConfig(rank=4, alpha=2.5, dropout=0.1, targets=("down_proj", "gate_proj")),
    "head": LoraConfig(rank=4, targets=("v_proj", "lm_head")),
    "patterns": LoraConfig(
        rank=4,
        use_rslora=True,
        layers_to_transform=(0, 2),
        rank_pattern={"2.self_attn.q_proj": 6, "k_proj": 1},
        alpha_pattern={r"layers\.0\..*": 2.5},
        targets=("q_proj", "k_proj", "up_proj"),
    ),
    "DoRA": LoraConfig(rank=3, use_dora=True, targets="all-linear", layers_to_transform=(0, 1)),
}


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
def test_peft_computes_our_logits(lora: LoraConfig, written: Written, tmp_path: Path) -> None:
    if "lm_head" in lora.targets and written.config.tie_word_embeddings:
        pytest.skip("a tied head cannot have an adapter")
    # With seed 0, DoRA on the tied base has a position that amplifies rounding: its logits in float64 move by up to
    # 1e-4 if every weight changes by 6e-8 of itself, so that results in float32 cannot be compared there.
    adapter = random_adapter(written.config, lora, "some/base", seed=int(lora.use_dora))
    report = write_adapter(
        tmp_path / "adapter", adapter, written.config, trained=True, logits=lambda a: our_logits(written, a)
    )
    ours, theirs = our_logits(written, adapter), peft_logits(written, tmp_path / "adapter")
    assert np.abs(ours - our_logits(written, None)).max() > 0.1
    # Both sides compute in float32 with different summation orders; logits are O(1).
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    assert report.logit_shift == 0
    assert report.directory == tmp_path / "adapter"
    found = read_adapter(tmp_path / "adapter", written.config)
    assert found.lora == lora
    assert all(np.array_equal(found.params[path], value) for path, value in adapter.params.items())


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
def test_merging_gives_the_weights_of_peft(lora: LoraConfig, tmp_path: Path) -> None:
    adapter = random_adapter(SMALL, lora)
    write_adapter(tmp_path / "a", adapter, SMALL, trained=True)
    merged = peft.PeftModel.from_pretrained(torch_llama(SMALL), tmp_path / "a").merge_and_unload().state_dict()
    base = torch_llama(SMALL).state_dict()
    changed = set()
    for module, module_name in ModelSpec(SMALL).linear.items():
        for layer in range(module_name.layers or 1):
            name = f"{module_name.of_layer(layer)}.weight"
            ours = adapter.merge(base[name].numpy(), module, layer)
            np.testing.assert_allclose(ours, merged[name].numpy(), atol=2e-6)
            rows = slice(5, 9)
            piece = adapter.merge(base[name].numpy()[rows], module, layer, rows)
            np.testing.assert_allclose(piece, ours[rows], atol=1e-6)  # another order of sums
            changed |= {name} if np.abs(ours - base[name].numpy()).max() > 0.01 else set()
    assert len(changed) == sum(int((ranks > 0).sum()) for ranks, _ in adapter.spec.ranks.values())


def test_the_directory_is_what_peft_and_vllm_expect(tmp_path: Path) -> None:
    write_adapter(
        tmp_path / "adapter",
        random_adapter(SMALL, LoraConfig(), "lmsys/vicuna"),
        SMALL,
        trained=True,
        facts=Facts({"data": "flan-mini, 3 epochs"}, [Measured("MMLU", "accuracy", "49.1", 14042)]),
    )
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (8, 16, 0.05)
    assert isinstance(config["lora_alpha"], int)
    assert config["base_model_name_or_path"] == "lmsys/vicuna"
    with safetensors_open(tmp_path / "adapter" / "adapter_model.safetensors") as file:
        assert file.metadata() == {"format": "pt"}
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"torch.float32"}  # noqa: SIM118
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "flan-mini, 3 epochs" in card
    assert 'base_model: "lmsys/vicuna"' in card


def safetensors_open(path: Path):
    return pytest.importorskip("safetensors").safe_open(path, "pt")


@pytest.mark.parametrize("config", [SMALL, GROUPED], ids=["plain", "grouped"])
def test_written_adapters_read_back_bit_for_bit(config: LlamaConfig, tmp_path: Path) -> None:
    adapter = random_adapter(config, LoraConfig(rank=5, alpha=11.0, targets=PROJECTIONS), "base")
    write_adapter(tmp_path / "a", adapter, config, trained=True)
    found = read_adapter(tmp_path / "a", config)
    assert (found.lora, found.base_name) == (adapter.lora, "base")
    for path, value in adapter.params.items():
        np.testing.assert_array_equal(found.params[path], value)


def test_bfloat16_files_have_the_rounded_values(tmp_path: Path) -> None:
    adapter = random_adapter(SMALL, LoraConfig())
    write_adapter(tmp_path / "a", adapter, SMALL, trained=True, dtype="bfloat16")
    found = read_adapter(tmp_path / "a", SMALL)
    for path, value in adapter.params.items():
        rounded = torch.tensor(value).bfloat16().float().numpy()
        np.testing.assert_array_equal(found.params[path], rounded)


def test_an_untrained_adapter_is_an_error_only_after_training(tmp_path: Path) -> None:
    adapter = random_adapter(SMALL, LoraConfig())
    adapter.params["layers/q_proj/lora_b"][:] = 0
    write_adapter(tmp_path / "untrained", adapter, SMALL, trained=False)
    with pytest.raises(VerificationError, match="still all zeros"):
        write_adapter(tmp_path / "trained", adapter, SMALL, trained=True)
    assert [path.name for path in tmp_path.iterdir()] == ["untrained"]


def test_non_finite_values_leave_nothing_behind(tmp_path: Path) -> None:
    adapter = random_adapter(SMALL, LoraConfig())
    adapter.params["layers/v_proj/lora_a"][1, 2, 3] = np.nan
    with pytest.raises(UserError, match="not finite"):
        write_adapter(tmp_path / "a", adapter, SMALL, trained=True)
    assert not list(tmp_path.iterdir())


def test_different_logits_leave_nothing_behind(tmp_path: Path) -> None:
    answers = iter([np.zeros(3), np.full(3, 2e-4)])
    with pytest.raises(VerificationError, match="logits differ"):
        write_adapter(
            tmp_path / "a", random_adapter(SMALL, LoraConfig()), SMALL, trained=True, logits=lambda _: next(answers)
        )
    assert not list(tmp_path.iterdir())


def test_an_existing_target_is_kept_unless_replace_is_set(tmp_path: Path) -> None:
    adapter = random_adapter(SMALL, LoraConfig())
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "precious").touch()
    with pytest.raises(UserError, match="exists and is not empty"):
        write_adapter(tmp_path / "a", adapter, SMALL, trained=True)
    assert (tmp_path / "a" / "precious").exists()
    write_adapter(tmp_path / "a", adapter, SMALL, trained=True, replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert not (tmp_path / "a" / "precious").exists()


PEFT_VARIANTS = {
    "plain": {},
    "all projections": {"target_modules": list(PROJECTIONS), "r": 3, "lora_alpha": 5},
    "rank-stabilised": {"use_rslora": True, "r": 7},
    "rank pattern": {"rank_pattern": {"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 6}},
    "alpha pattern": {"alpha_pattern": {"v_proj": 3}, "target_modules": ["q_proj", "v_proj", "up_proj"]},
    "both and rank-stabilised": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 9}, "use_rslora": True},
    "some layers": {"layers_to_transform": [0, 2]},
    "DoRA": {"use_dora": True, "rank_pattern": {"q_proj": 2}, "target_modules": list(PROJECTIONS)},
    "DoRA in some layers": {"use_dora": True, "layers_to_transform": [2, 0]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "by expression": {"target_modules": r".*\.[01]\.(self_attn\.k_proj|mlp\.down_proj)"},
}


def by_peft(path: Path, config: LlamaConfig, **settings: object) -> None:
    """An adapter that PEFT made and saved, with a random B."""
    torch.manual_seed(1)
    variant = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | settings
    model = peft.get_peft_model(torch_llama(config), peft.LoraConfig(**variant))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
        if "magnitude" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(path)


@pytest.mark.parametrize("variant", PEFT_VARIANTS.values(), ids=PEFT_VARIANTS)
def test_adapters_of_peft_give_its_logits(variant: dict, tmp_path: Path) -> None:
    by_peft(tmp_path, GROUPED, **variant)
    written = Written(tmp_path, torch_llama(GROUPED), GROUPED)
    adapter = read_adapter(tmp_path, GROUPED)
    ours, theirs = our_logits(written, adapter), peft_logits(written, tmp_path)
    assert np.abs(theirs - our_logits(written, None)).max() > 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_patterns_without_a_matching_module_are_ignored_like_in_peft(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="did not match"):
        by_peft(tmp_path, SMALL, rank_pattern={"zzz": 2, "v_proj": 3}, alpha_pattern={"k_proj": 5})
    found = read_adapter(tmp_path, SMALL).lora
    assert (found.rank_pattern, found.alpha_pattern) == ((("v_proj", 3.0),), ())


def test_a_legacy_bin_adapter_with_default_infix(tmp_path: Path) -> None:
    by_peft(tmp_path, SMALL)
    expected = read_adapter(tmp_path, SMALL).params
    state = files.load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({n.replace(".weight", ".default.weight"): t for n, t in state.items()}, tmp_path / "adapter_model.bin")
    found = read_adapter(tmp_path, SMALL).params
    assert all(np.array_equal(found[path], expected[path]) for path in expected)


REFUSED = {
    "use_dora": {"use_dora": True, "target_modules": r".*\.[01]\.self_attn\.q_proj|.*\.1\.mlp\.up_proj"},
    "lora_bias": {"lora_bias": True},
    "lm_head": {"target_modules": ["q_proj", "lm_head"], "use_dora": True},
}


@pytest.mark.parametrize("key", REFUSED)
def test_unsupported_settings_are_named(key: str, tmp_path: Path) -> None:
    by_peft(tmp_path, SMALL, **REFUSED[key])
    with pytest.raises(UserError, match=key):
        read_adapter(tmp_path, SMALL)


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head"])
def test_a_table_of_a_resized_vocabulary_is_named(name: str, tmp_path: Path) -> None:
    by_peft(tmp_path, SMALL)
    path = tmp_path / "adapter_model.safetensors"
    larger = torch.zeros(SMALL.vocab_size + 8, SMALL.hidden_size)
    files.save_file(files.load_file(path) | {f"base_model.model.{name}.weight": larger}, path)
    with pytest.raises(UserError, match=r"of 105 rows, but the base has 97, .*: the vocabulary was resized"):
        read_adapter(tmp_path, SMALL)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": 5}, "rank 5, but its tensors have rank 4"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"lora_alpha": 1e300}, "lora_alpha is 1e+300"),
        ({"r": 4.5}, "r is 4.5, not a positive"),
        ({"r": 10**30}, "r is 1000"),
        ({"rank_pattern": {"q_proj": 4.5}}, "gives 4.5"),
        ({"rank_pattern": {"(" * 5000: 4}}, "is not a regular expression"),
        ({"lora_dropout": 1.5}, "lora_dropout is 1.5"),
        ({"target_modules": ["q_proj", "k_proj"]}, "targets model.layers.0.self_attn.k_proj, model.layers.1."),
        ({"target_modules": ["q_proj"]}, "does not target model.layers.0.self_attn.v_proj"),
        ({"target_modules": "("}, "is not a regular expression"),
        ({"target_modules": 5}, "target_modules is '5', not an expression, or a list"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform is"),
        ({"exclude_modules": [None]}, "exclude_modules is"),
        ({"trainable_token_indices": [3, 3]}, "not a list of different ids"),
        ({"trainable_token_indices": [3]}, "the trained rows of model.embed_tokens have shape [0, 48]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"rank_pattern": {"(": 3}}, "not a regular expression"),
        ({"alpha_pattern": {"q_proj": "x"}}, "gives 'x'"),
    ],
)
def test_settings_that_do_not_match_the_tensors(change: dict, says: str, tmp_path: Path) -> None:
    by_peft(tmp_path, SMALL)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as raised:
        read_adapter(tmp_path, SMALL)
    assert says in str(raised.value)


def test_an_adapter_of_another_model_is_an_error(tmp_path: Path) -> None:
    by_peft(tmp_path, SMALL)
    with pytest.raises(UserError, match="belongs to another model"):
        read_adapter(tmp_path, GROUPED)
    shallow = dataclasses.replace(SMALL, num_layers=2)
    with pytest.raises(UserError, match="adapter in layer 2, but the base has 2 layers"):
        read_adapter(tmp_path, shallow)


@pytest.mark.parametrize("lost", ["lora_A", "lora_B"])
def test_a_missing_factor_is_named(lost: str, tmp_path: Path) -> None:
    by_peft(tmp_path, SMALL)
    state = files.load_file(tmp_path / "adapter_model.safetensors")
    files.save_file(
        {n: t for n, t in state.items() if not (lost in n and "layers.1" in n)}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(UserError, match=f"q_proj of layer 1 has no {lost}"):
        read_adapter(tmp_path, SMALL)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no adapter_config\.json"):
        read_adapter(tmp_path, SMALL)
    by_peft(tmp_path, SMALL)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"neither adapter_model\.safetensors nor"):
        read_adapter(tmp_path, SMALL)
