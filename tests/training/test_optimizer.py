"""The optimizer against torch and transformers, and the layout of its state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from flacuna_jax.config import TrainingConfig
from flacuna_jax.training.optimizer import (
    is_decayed,
    learning_rate_schedule,
    make_optimizer,
    optimizer_state_shardings,
)

SHAPES = {
    "layers/q_proj/lora_a": (2, 4, 16),
    "layers/q_proj/lora_b": (2, 16, 4),
    "layers/q_proj/weight": (2, 16, 16),
    "layers/input_layernorm/weight": (2, 16),
    "norm/weight": (16,),
    "embed_tokens/weight": (32, 16),
}


def settings(**values) -> TrainingConfig:
    return TrainingConfig(**{"learning_rate": 1e-2, **values})


def random_arrays(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: (scale * rng.standard_normal(shape)).astype(np.float32) for path, shape in SHAPES.items()}


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 20), (1, 20), (7, 20), (19, 20), (3000, 10417)])
def test_schedule_equals_transformers_at_every_step(schedule, warmup, total):
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


@pytest.mark.parametrize("max_grad_norm", [1.0, None])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_trajectory_equals_torch_adamw_with_clipping(max_grad_norm, weight_decay):
    steps = 16
    training = settings(max_grad_norm=max_grad_norm, weight_decay=weight_decay, warmup_steps=3)
    start = random_arrays(0)
    tensors = {path: torch.nn.Parameter(torch.from_numpy(array.copy())) for path, array in start.items()}
    groups = [
        {"params": [t for path, t in tensors.items() if "norm" not in path], "weight_decay": weight_decay},
        {"params": [t for path, t in tensors.items() if "norm" in path], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, 0.999), eps=1e-8)
    scheduler = transformers.get_cosine_schedule_with_warmup(reference, 3, steps)

    optimizer = make_optimizer(training, steps)
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
    optimizer = make_optimizer(settings(warmup_steps=2), 10)
    params = {path: jnp.asarray(array) for path, array in random_arrays(0).items()}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert all(not np.any(update) for update in updates.values())


def test_clipping_follows_torch_at_the_limit():
    gradient = np.full((2, 4, 16), 1e-7, np.float32)  # norm 1.1e-6, where torch's added 1e-6 halves the result
    optimizer = make_optimizer(settings(max_grad_norm=1e-8, learning_rate=1.0, schedule="constant"), 1)
    params = {"layers/q_proj/lora_a": jnp.zeros((2, 4, 16))}
    _, state = optimizer.update({"layers/q_proj/lora_a": jnp.asarray(gradient)}, optimizer.init(params), params)
    tensor = torch.nn.Parameter(torch.zeros(2, 4, 16))
    tensor.grad = torch.from_numpy(gradient.copy())
    torch.nn.utils.clip_grad_norm_([tensor], 1e-8)
    first_moment = optax.tree_utils.tree_get(state, "mu")["layers/q_proj/lora_a"]
    np.testing.assert_allclose(first_moment, 0.1 * tensor.grad.numpy(), rtol=1e-5)


def test_decay_applies_to_matrices_and_adapters_only():
    assert {path for path in SHAPES if not is_decayed(path)} == {"layers/input_layernorm/weight", "norm/weight"}
    assert not is_decayed("layers/q_proj/bias")
    assert is_decayed("lm_head/weight")


def test_moments_are_float32_for_bfloat16_parameters():
    optimizer = make_optimizer(settings(), 10)
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
    optimizer = make_optimizer(settings(weight_decay=0.1), 10)

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
