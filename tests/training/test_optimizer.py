"""The optimizer against torch and transformers, and the layout of its state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flacuna_jax.config.run import MeshConfig
from flacuna_jax.config.training import TrainingConfig
from flacuna_jax.errors import UserError
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import ModelSpec, init_params
from flacuna_jax.model.sharding import make_mesh
from flacuna_jax.training.optimizer import (
    is_decayed,
    learning_rate_schedule,
    make_optimizer,
    optimizer_state_shardings,
    require_words,
)
from flacuna_jax.training.state import StateLayout
from tests.tiny import described

SHAPES = {
    "layers/q_proj/lora_a": (2, 4, 16),
    "layers/q_proj/lora_b": (2, 16, 4),
    "layers/q_proj/weight": (2, 16, 16),
    "layers/input_layernorm/weight": (2, 16),
    "norm/weight": (16,),
    "embed_tokens/weight": (32, 16),
}
PARAMETERS = described(SHAPES)


def settings(**values) -> TrainingConfig:
    return TrainingConfig(**{"learning_rate": 1e-2, **values})


def random_arrays(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: (scale * rng.standard_normal(shape)).astype(np.float32) for path, shape in SHAPES.items()}


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 20), (1, 20), (7, 20), (19, 20), (3000, 10417)])
def test_schedule_equals_transformers_at_every_step(schedule, warmup, total, torch, transformers):
    training = settings(schedule=schedule, warmup_steps=warmup, learning_rate=2e-5)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
    make = getattr(transformers, f"get_{schedule}_schedule_with_warmup")
    lengths = {} if schedule == "constant" else {"num_training_steps": total}
    reference = make(optimizer, num_warmup_steps=warmup, **lengths).lr_lambdas[0]

    expected = np.array([training.learning_rate * reference(step) for step in range(total + 1)])
    ours = np.asarray(jax.vmap(learning_rate_schedule(training, total))(jnp.arange(total + 1)))

    # float32 against Python floats: 1e-6 of the value, and 1e-12 of the peak where the rate itself is 0.
    np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=1e-12 * training.learning_rate)
    if warmup:
        assert ours[0] == 0.0


def test_warmup_ratio_is_rounded_down():
    """So the shortest run has a step at its full learning rate."""
    rate = learning_rate_schedule(settings(schedule="constant", warmup_ratio=0.1, learning_rate=1.0), 25)
    assert [float(rate(step)) for step in range(4)] == [0.0, 0.5, 1.0, 1.0]
    assert settings(warmup_ratio=0.9).warmup_of(1) == 0


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_trajectory_equals_torch_adamw_with_clipping(max_grad_norm, weight_decay, torch, transformers):
    steps = 16
    training = settings(max_grad_norm=max_grad_norm, weight_decay=weight_decay, warmup_steps=3)
    start = random_arrays(0)
    tensors = {path: torch.nn.Parameter(torch.from_numpy(array.copy())) for path, array in start.items()}
    groups = [
        {
            "params": [t for path, t in tensors.items() if is_decayed(path, PARAMETERS[path])],
            "weight_decay": weight_decay,
        },
        {"params": [t for path, t in tensors.items() if not is_decayed(path, PARAMETERS[path])], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, 0.999), eps=1e-8)
    scheduler = transformers.get_cosine_schedule_with_warmup(reference, 3, steps)

    optimizer = make_optimizer(training, steps, PARAMETERS)
    params = {path: jnp.asarray(array) for path, array in start.items()}
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for step in range(steps):
        # Norms from far below the limit to far above it, so that both branches of the clipping are taken.
        gradients = random_arrays(step + 1, scale=10.0 ** (step % 5 - 4))
        for path, tensor in tensors.items():
            tensor.grad = torch.from_numpy(gradients[path].copy())
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(tensors.values(), max_grad_norm)
        reference.step()
        scheduler.step()

        updates, state = update({path: jnp.asarray(g) for path, g in gradients.items()}, state, params)
        params = optax.apply_updates(params, updates)
        for path, array in params.items():
            # Float32 bias correction is off by 1e-5 of an update of 1e-2; values of size 3 round by 2e-7 each step.
            np.testing.assert_allclose(array, tensors[path].detach().numpy(), rtol=1e-6, atol=1e-6, err_msg=path)


def test_first_update_of_a_warm_up_changes_nothing():
    optimizer = make_optimizer(settings(warmup_steps=2), 10, PARAMETERS)
    params = {path: jnp.asarray(array) for path, array in random_arrays(0).items()}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert all(not np.any(update) for update in updates.values())


def test_clipping_follows_torch_at_the_limit(torch):
    gradient = np.full((2, 4, 16), 1e-7, np.float32)  # norm 1.1e-6, where torch's added 1e-6 halves the result
    params = {"layers/q_proj/lora_a": jnp.zeros((2, 4, 16))}
    training = settings(max_grad_norm=1e-8, learning_rate=1.0, schedule="constant")
    optimizer = make_optimizer(training, 1, described(params))
    _, state = optimizer.update({"layers/q_proj/lora_a": jnp.asarray(gradient)}, optimizer.init(params), params)
    tensor = torch.nn.Parameter(torch.zeros(2, 4, 16))
    tensor.grad = torch.from_numpy(gradient.copy())
    torch.nn.utils.clip_grad_norm_([tensor], 1e-8)
    first_moment = optax.tree_utils.tree_get(state, "mu")["layers/q_proj/lora_a"]
    np.testing.assert_allclose(first_moment, 0.1 * tensor.grad.numpy(), rtol=1e-5)


@pytest.mark.parametrize(
    ("settings_of_schedule", "make"),
    [
        ({"schedule": "cosine", "final_ratio": 0.1}, "get_cosine_with_min_lr_schedule_with_warmup"),
        ({"schedule": "warmup_stable_decay", "decay_steps": 6, "final_ratio": 0.2}, "get_wsd_schedule"),
        ({"schedule": "inverse_sqrt"}, "get_inverse_sqrt_schedule"),
    ],
)
@pytest.mark.parametrize("warmup", [0, 5])
def test_other_schedules_equal_transformers(settings_of_schedule, make, warmup, torch, transformers):
    total = 20
    training = settings(warmup_steps=warmup, **settings_of_schedule)
    lengths = {
        "get_cosine_with_min_lr_schedule_with_warmup": {"num_training_steps": total, "min_lr_rate": 0.1},
        "get_wsd_schedule": {"num_training_steps": total, "num_decay_steps": 6, "min_lr_ratio": 0.2},
        "get_inverse_sqrt_schedule": {},
    }[make]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=training.learning_rate)
    schedule = getattr(transformers.optimization, make)(optimizer, num_warmup_steps=warmup, **lengths)
    factor = schedule.lr_lambdas[0]
    # transformers' warmup_stable_decay warms up from its final ratio; all of ours do from 0.
    steps = np.arange(warmup if "wsd" in make else 0, total)
    ours = np.asarray(jax.vmap(learning_rate_schedule(training, total))(jnp.asarray(steps)))
    np.testing.assert_allclose(ours, [training.learning_rate * factor(int(step)) for step in steps], rtol=2e-6)


def run(training: TrainingConfig, start: dict[str, np.ndarray], gradients: list[dict[str, np.ndarray]]):
    optimizer = make_optimizer(training, len(gradients), described(start))
    params = {path: jnp.asarray(array) for path, array in start.items()}
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = jax.jit(optimizer.update)(
            {path: jnp.asarray(gradient[path]) for path in params}, state, params
        )
        params = optax.apply_updates(params, updates)
    return params


def test_adafactor_equals_transformers_layer_by_layer(torch, transformers):
    """transformers' Adafactor with an external learning rate; each layer of a stack is a separate matrix."""
    shapes = {
        "layers/q_proj/weight": (2, 128, 160),
        "layers/k_proj/weight": (2, 130, 128),
        "layers/input_layernorm/weight": (2, 160),
        "lm_head/weight": (144, 128),
    }
    rng = np.random.default_rng(0)
    start = {path: rng.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()}
    gradients = [
        {path: (scale * rng.standard_normal(shape)).astype(np.float32) for path, shape in shapes.items()}
        for scale in (1.0, 10.0, 0.01, 1.0)
    ]
    training = settings(optimizer="adafactor", schedule="constant", max_grad_norm=None, weight_decay=0.0)
    ours = run(training, start, gradients)
    for path in shapes:
        for layer in range(2) if path.startswith("layers/") else (...,):
            tensor = torch.nn.Parameter(torch.from_numpy(start[path][layer].copy()))
            reference = transformers.Adafactor(
                [tensor], lr=training.learning_rate, scale_parameter=False, relative_step=False
            )
            for gradient in gradients:
                tensor.grad = torch.from_numpy(gradient[path][layer].copy())
                reference.step()
            # Their order of products and roots differs; updates are 1e-2.
            np.testing.assert_allclose(ours[path][layer], tensor.detach().numpy(), atol=2e-6, err_msg=path)


def test_lion_follows_its_paper():
    """Compares with a direct implementation of algorithm 2 of arXiv:2302.06675."""
    b1, b2 = 0.95, 0.98
    training = settings(
        optimizer="lion", betas=(b1, b2), schedule="constant", max_grad_norm=None, weight_decay=0.1, no_decay=("norm",)
    )
    start, gradients = random_arrays(0), [random_arrays(step) for step in (1, 2, 3)]
    ours = run(training, start, gradients)
    for path, value in start.items():
        momentum = np.zeros_like(value)
        for gradient in gradients:
            update = np.sign(b1 * momentum + (1 - b1) * gradient[path])
            momentum = b2 * momentum + (1 - b2) * gradient[path]
            value = value - training.learning_rate * (update + (0.0 if "norm" in path else 0.1) * value)
        np.testing.assert_allclose(ours[path], value, rtol=1e-5, atol=1e-6, err_msg=path)


def test_lora_plus_equals_pefts_groups(torch):
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer

    ratio, decay = 8.0, 0.05
    torch.manual_seed(0)
    holder = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(16, 12, bias=False)})
    model = peft.get_peft_model(holder, peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=ratio, loraplus_weight_decay=decay
    )
    named = {
        ("lora_a" if "lora_A" in name else "lora_b" if "lora_B" in name else "lora_magnitude"): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    start = {f"layers/q_proj/{leaf}": p.detach().numpy()[None].copy() for leaf, p in named.items()}
    rng = np.random.default_rng(1)
    gradients = [{p: rng.standard_normal(v.shape).astype(np.float32) for p, v in start.items()} for _ in range(4)]
    for gradient in gradients:
        for leaf, parameter in named.items():
            parameter.grad = torch.from_numpy(gradient[f"layers/q_proj/{leaf}"][0].copy())
        optimizer.step()
    training = settings(
        lora_plus_ratio=ratio, schedule="constant", max_grad_norm=None, weight_decay=decay, no_decay=("norm",)
    )
    ours = run(training, start, gradients)
    for leaf, parameter in named.items():
        np.testing.assert_allclose(ours[f"layers/q_proj/{leaf}"][0], parameter.detach().numpy(), rtol=2e-5, atol=2e-6)


def test_decay_applies_to_matrices_and_adapters_only():
    spared = {"layers/input_layernorm/weight", "norm/weight", "embed_tokens/weight", "layers/q_proj/bias"}
    spared.add("layers/q_proj/lora_magnitude")
    parameters = described({*SHAPES, *spared, "lm_head/weight"})
    assert {path for path, found in parameters.items() if not is_decayed(path, found)} == spared
    assert is_decayed("embed_tokens/weight", parameters["embed_tokens/weight"], no_decay=("norm",))


def test_no_decay_with_a_kind_excludes_parameters_of_any_name():
    norm = described(["norm/weight"])["norm/weight"]
    assert not is_decayed("layers/ln_1/weight", norm, no_decay=("norm",))
    assert is_decayed("layers/ln_1/weight", norm, no_decay=("bias",))


def test_a_word_of_no_decay_that_matches_nothing_is_an_error():
    paths = ["embed_tokens/weight", "layers/input_layernorm/weight", "layers/q_proj/lora_a"]
    require_words((*TrainingConfig().no_decay, "lora_a", "layernorm"), described(paths))
    with pytest.raises(UserError, match=r"no name contains 'LayerNorm\.weight'; names are embed_tokens/weight, "):
        require_words(("bias", "LayerNorm.weight"), described(paths))


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion"])
def test_state_is_sharded_like_the_weights_in_full_fine_tuning(name):
    """On 4 devices, each has a quarter of every large moment; master weights are float32."""
    config = LlamaConfig(256, 128, 384, 2, 4, 4, 32)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    spec = ModelSpec(config, None, "bfloat16", "float32")
    layout = StateLayout(spec, make_optimizer(settings(optimizer=name), 10, spec.trainable), mesh)
    state = layout.begin(init_params(spec, spec.base, 0, mesh))
    assert {leaf.dtype.name for leaf in state.trainable.values()} == {"float32"}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
        assert leaf.dtype.name in ("float32", "int32")
        if leaf.ndim == 3 or leaf.shape == (256, 128):  # a moment of the weight's own shape
            assert leaf.addressable_shards[0].data.size == leaf.size // 4, jax.tree_util.keystr(path)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.opt_state))
    weights = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state.trainable))
    low, high = {"adamw": (2.0, 2.05), "lion": (1.0, 1.05), "adafactor": (0, 0.1)}[name]
    assert low <= held / weights <= high


def test_moments_are_float32_for_bfloat16_parameters():
    optimizer = make_optimizer(settings(), 10, PARAMETERS)
    params = {path: jnp.asarray(array, jnp.bfloat16) for path, array in random_arrays(0).items()}
    state = optimizer.init(params)
    _, state = jax.jit(optimizer.update)(params, state, params)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert len(moments) == 2 * len(params)
    assert {leaf.dtype for leaf in moments} == {jnp.dtype("float32")}


def test_moments_are_laid_out_like_their_parameters_and_the_step_compiles_once():
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    specs = {path: PartitionSpec() for path in SHAPES}
    specs["layers/q_proj/weight"] = PartitionSpec(None, "fsdp", "tensor")
    specs["embed_tokens/weight"] = PartitionSpec("tensor", "fsdp")
    shardings = {path: NamedSharding(mesh, spec) for path, spec in specs.items()}
    params = {path: jax.device_put(array, shardings[path]) for path, array in random_arrays(0).items()}
    abstract = {path: jax.ShapeDtypeStruct(array.shape, array.dtype) for path, array in params.items()}
    optimizer = make_optimizer(settings(weight_decay=0.1), 10, PARAMETERS)

    state_shardings = optimizer_state_shardings(optimizer, abstract, shardings, mesh)
    state = jax.jit(optimizer.init, out_shardings=state_shardings)(params)

    for moment in ("mu", "nu"):
        for path, array in optax.tree_utils.tree_get(state, moment).items():
            assert array.sharding == shardings[path], (moment, path)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state) if leaf.ndim == 0)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = step(params, state)
    assert step._cache_size() == 1
