"""LoRA's variants against PEFT, float32: logits and gradients of patterns, layer subsets, rsLoRA, DoRA, the head."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flacuna_jax.config.model import LoraConfig, ModelConfig
from flacuna_jax.config.run import MeshConfig
from flacuna_jax.config.training import TrainingConfig
from flacuna_jax.config.types import HEAD, PROJECTIONS
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface import names
from flacuna_jax.model.lora import require_matches, row_norms
from flacuna_jax.model.parameters import ModelSpec, Params, count
from flacuna_jax.model.sharding import make_mesh, parameter_shardings
from flacuna_jax.training.network import NetworkConfig
from flacuna_jax.training.optimizer import make_optimizer
from flacuna_jax.training.state import StateLayout
from flacuna_jax.training.step import StepConfig, loss_and_gradients, make_step
from tests.tiny import SMALL, in_steps, packed_batch, to_device
from tests.torch_models import from_torch, torch, torch_llama

peft = pytest.importorskip("peft")

LENGTH = 24
RNG = np.random.default_rng(7)
DOCUMENTS = [RNG.integers(1, SMALL.vocab_size, size).tolist() for size in (9, 14, 5, 20)]
ROWS = [[0, 1], [2], [3], []]
VARIANTS = {
    "all-linear": LoraConfig(rank=4, alpha=12.0, targets="all-linear"),
    "head": LoraConfig(rank=3, alpha=6.0, targets=("q_proj", "lm_head")),
    "rank-stabilised": LoraConfig(rank=5, use_rslora=True),
    "rank pattern": LoraConfig(rank=4, rank_pattern={"q_proj": 2, r"layers\.1\.self_attn\.v_proj": 6}),
    "alpha pattern": LoraConfig(rank=4, alpha_pattern={r"[02]\.self_attn\.v_proj": 3.0}, targets=PROJECTIONS),
    "some layers": LoraConfig(rank=4, layers_to_transform=(0, 2), targets=("k_proj", "down_proj")),
    "DoRA": LoraConfig(rank=4, alpha=3.0, use_dora=True, targets=PROJECTIONS),
    "DoRA, patterns, rank-stabilised, some layers": LoraConfig(
        rank=3,
        use_dora=True,
        use_rslora=True,
        layers_to_transform=(1, 2),
        rank_pattern={"2.self_attn.q_proj": 5},
        alpha_pattern={"v_proj": 7.0},
    ),
}


def spec_of(lora: LoraConfig) -> ModelSpec:
    return ModelSpec(SMALL, lora.model_copy(update={"dropout": 0.0}), "float32", "float32")


def by_peft(lora: LoraConfig) -> Any:
    """PEFT's model with the same settings, its adapters changed from their initial values."""
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=list(lora.targets),
        layers_to_transform=None if lora.layers_to_transform is None else list(lora.layers_to_transform),
        rank_pattern=dict(lora.rank_pattern),
        alpha_pattern=dict(lora.alpha_pattern),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(torch_llama(SMALL), settings)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def adapters_of(model: Any, spec: ModelSpec, gradients: bool = False) -> Params:
    """PEFT's tensors in our layout: stacked, with zeros for layers of lower rank or without an adapter."""
    params = {path: np.zeros(shape, np.float32) for path, shape in spec.lora_shapes.items()}
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            continue
        path, layer = names.parse_adapter_name(name, SMALL)  # type: ignore[misc]
        value = (parameter.grad if gradients else parameter.detach()).numpy()
        target = params[path][layer] if spec.adapters[path].stacked else params[path]
        target[tuple(map(slice, value.shape))] = value
    return {path: jnp.asarray(value) for path, value in params.items()}


def torch_loss(model: Any) -> Any:
    total, supervised = torch.zeros(()), 0
    for ids in DOCUMENTS:
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
        supervised += len(ids) - 1
    return total / supervised


def our_gradients(spec: ModelSpec, adapters: Params, base: Params, mesh: MeshConfig) -> tuple[jax.Array, Params]:
    batch = to_device(in_steps(packed_batch(DOCUMENTS, ROWS, LENGTH), 4))
    with jax.set_mesh(make_mesh(mesh)):
        run = jax.jit(loss_and_gradients, static_argnums=0)
        loss, _, gradients = run(StepConfig(NetworkConfig(spec)), adapters, base, batch, jnp.int32(0))
    return loss, gradients


@pytest.mark.parametrize("lora", VARIANTS.values(), ids=VARIANTS)
def test_loss_gradients_and_count_equal_those_of_peft(lora: LoraConfig) -> None:
    reference, spec = by_peft(lora), spec_of(lora)
    base = from_torch(torch_llama(SMALL), SMALL)
    expected = torch_loss(reference)
    expected.backward()
    loss, gradients = our_gradients(spec, adapters_of(reference, spec), base, MeshConfig(fsdp=2, tensor=2))

    assert float(loss) == pytest.approx(expected.item(), abs=1e-5)
    for path, value in adapters_of(reference, spec, gradients=True).items():
        # Including padding: without a parameter in PEFT, the gradient is exactly zero.
        assert np.all(np.asarray(gradients[path])[np.asarray(value) == 0] == 0), path
        error = np.linalg.norm(gradients[path] - value) / np.linalg.norm(value)
        assert error < 1e-4, (path, error)  # float32 sums in another order
    trained = sum(parameter.numel() for name, parameter in reference.named_parameters() if "lora_" in name)
    assert spec.trainable_count == trained


@pytest.mark.slow
def test_steps_with_all_options_equal_those_of_peft() -> None:
    """DoRA, patterns, rank-stabilised, some layers, LoRA+ rates, decay, clipping: three AdamW steps on both sides."""
    lora = VARIANTS["DoRA, patterns, rank-stabilised, some layers"]
    reference, spec, mesh = by_peft(lora), spec_of(lora), make_mesh(MeshConfig())
    rates = TrainingConfig(
        learning_rate=1e-2, schedule="constant", lora_plus_ratio=4.0, weight_decay=0.1, no_decay=("norm",)
    )
    layout = StateLayout(spec, make_optimizer(rates, 3, spec.trainable), mesh)
    base = jax.device_put(from_torch(torch_llama(SMALL), SMALL), parameter_shardings(spec.base, mesh))
    state = layout.begin(adapters_of(reference, spec))
    batch = to_device(in_steps(packed_batch(DOCUMENTS, ROWS, LENGTH), 2))
    step = make_step(StepConfig(NetworkConfig(spec)), layout.optimizer, mesh, layout.shardings)

    groups = {"lr": 1e-2, "loraplus_lr_ratio": 4.0, "weight_decay": 0.1, "loraplus_weight_decay": 0.1}
    optimizer = pytest.importorskip("peft.optimizers").create_loraplus_optimizer(reference, torch.optim.AdamW, **groups)
    trained = [parameter for parameter in reference.parameters() if parameter.requires_grad]
    trainable, opt_state = state.trainable, state.opt_state
    for index in range(3):
        trainable, opt_state, metrics = step(trainable, opt_state, base, batch, index)
        optimizer.zero_grad()
        expected = torch_loss(reference)
        expected.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        assert float(metrics.loss) == pytest.approx(expected.item(), abs=3e-5)
    for path, value in adapters_of(reference, spec).items():
        # AdamW divides by gradients, so the last bits of float32 matter for those near zero.
        np.testing.assert_allclose(trainable[path], value, atol=5e-4, err_msg=path)


def test_dora_initially_equals_the_base() -> None:
    spec = spec_of(LoraConfig(rank=4, use_dora=True, layers_to_transform=(0, 2)))
    mesh = make_mesh(MeshConfig())
    base = from_torch(torch_llama(SMALL), SMALL)
    adapters = StateLayout(spec, optax.identity(), mesh).fresh_adapters(0, base)
    assert adapters.keys() == spec.lora_shapes.keys()
    magnitude = np.asarray(adapters["layers/q_proj/lora_magnitude"])
    np.testing.assert_allclose(
        magnitude[[0, 2]], np.linalg.norm(base["layers/q_proj/weight"], axis=-1)[[0, 2]], rtol=1e-6
    )
    assert not magnitude[1].any()
    plain, _ = our_gradients(spec_of(LoraConfig(rank=4)), _zeros(spec_of(LoraConfig(rank=4))), base, MeshConfig())
    loss, _ = our_gradients(spec, adapters, base, MeshConfig())
    assert float(loss) == pytest.approx(float(plain), abs=1e-6)


def _zeros(spec: ModelSpec) -> Params:
    return {path: jnp.zeros(shape) for path, shape in spec.lora_shapes.items()}


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_training_never_changes_elements_beyond_a_layers_rank(decay: float) -> None:
    spec = spec_of(VARIANTS["DoRA, patterns, rank-stabilised, some layers"])
    mesh = make_mesh(MeshConfig())
    layout = StateLayout(
        spec, make_optimizer(TrainingConfig(learning_rate=1e-2, weight_decay=decay), 5, spec.trainable), mesh
    )
    base = jax.device_put(from_torch(torch_llama(SMALL), SMALL), parameter_shardings(spec.base, mesh))
    state = layout.begin(layout.fresh_adapters(0, base))
    batch = to_device(in_steps(packed_batch(DOCUMENTS, ROWS, LENGTH), 2))
    step = make_step(StepConfig(NetworkConfig(spec)), layout.optimizer, mesh, layout.shardings)
    trainable, opt_state = state.trainable, state.opt_state
    for index in range(3):
        trainable, opt_state, _ = step(trainable, opt_state, base, batch, index)
    live = sum(int(np.count_nonzero(value)) for value in trainable.values())
    assert live == spec.trainable_count < count(spec.lora_shapes)


def test_valid_targets_of_a_config_are_the_modules_of_the_network() -> None:
    """`lora.targets` is checked before a model is opened, against a list that this test checks."""
    linear = [module.last for module in ModelSpec(SMALL).linear.values()]
    assert sorted(linear) == sorted((*PROJECTIONS, HEAD))


def test_a_target_that_the_network_does_not_have_is_named() -> None:
    modules = [module for module in ModelSpec(SMALL).linear.values() if module.last != "gate_proj"]
    with pytest.raises(UserError, match=r"lora\.targets: the model has no module gate_proj; it has "):
        require_matches(LoraConfig(targets=("gate_proj",)), modules)


def test_row_norms_equal_those_of_the_sum() -> None:
    rng = np.random.default_rng(0)
    w, a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((7, 12), (3, 12), (7, 3)))
    np.testing.assert_allclose(row_norms(w, a, b), np.linalg.norm(w + b @ a, axis=-1), rtol=1e-5)


def test_a_layer_that_does_not_exist_is_named() -> None:
    with pytest.raises(UserError, match="layer 3 does not exist; the model has 3 layers"):
        ModelSpec.of_run(SMALL, ModelConfig(path="x"), LoraConfig(layers_to_transform=(1, 3)))


@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["q_prj", "layers", r"layers\.1\..*", "k_proj"])
def test_a_pattern_without_a_matching_adapter_is_named(key: str, pattern: str) -> None:
    lora = LoraConfig(targets=("q_proj", "v_proj"), layers_to_transform=(0, 2), **{key: {"v_proj": 3, pattern: 4}})
    with pytest.raises(UserError, match=rf"lora\.{key}: .* an example of a name is model\.layers\.0\.self_attn"):
        ModelSpec.of_run(SMALL, ModelConfig(path="x"), lora)
    assert ModelSpec(SMALL, lora).ranks, "other adapters may have such a pattern"


def test_dropout_applies_to_the_adapter_of_the_head() -> None:
    spec = ModelSpec(SMALL, LoraConfig(rank=3, dropout=0.5, targets=("lm_head",)), "float32", "float32")
    reference = by_peft(spec.lora)
    base = from_torch(torch_llama(SMALL), SMALL)
    adapters = adapters_of(reference, spec)
    batch = to_device(in_steps(packed_batch(DOCUMENTS, ROWS, LENGTH), 4))
    losses = [
        float(loss_and_gradients(StepConfig(NetworkConfig(spec)), adapters, base, batch, jnp.int32(index))[0])
        for index in (0, 1, 0)
    ]
    assert losses[0] == losses[2] != losses[1]


def test_a_tied_head_cannot_be_a_target() -> None:
    tied = dataclasses.replace(SMALL, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"lm_head of this model is its embedding table \(tie_word_embeddings\)"):
        ModelSpec.of_run(tied, ModelConfig(path="x"), LoraConfig(targets=("q_proj", "lm_head")))
