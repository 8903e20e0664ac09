"""AdamW as torch and transformers run it: schedule, clipping by global norm, decay on matrices only.

Parameters, gradients and moments are flat dicts `{"layers/q_proj/lora_a": array, ...}`. Everything here computes in
float32, whatever the dtype of the parameters.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flacuna_jax.config import TrainingConfig

Params = dict[str, jax.Array]

ADAM_BETAS = (0.9, 0.999)
ADAM_EPSILON = 1e-8
# torch.nn.utils.clip_grad_norm_ divides by (norm + 1e-6), so that a gradient at the limit shrinks by a millionth.
CLIP_EPSILON = 1e-6


def learning_rate_schedule(training: TrainingConfig, total_steps: int) -> optax.Schedule:
    """Learning rate of each step, float32: the schedules of the same names in transformers.

    Step s = 0 is the first update. Warm-up is linear and begins at exactly 0: with `warmup_steps` = w, step s < w has
    s / w of the peak. Cosine and linear reach 0 at `total_steps`, one step after the last update.
    """
    warmup = training.warmup_steps
    decay_steps = max(1, total_steps - warmup)

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        left = (total_steps - step) / decay_steps
        factor = {
            # (1 + cos(pi (1 - left))) / 2, in the form that loses no digits where the rate is near 0.
            "cosine": jnp.sin(0.5 * jnp.pi * left) ** 2,
            "linear": jnp.maximum(0.0, left),
            "constant": jnp.float32(1.0),
        }[training.schedule]
        return training.learning_rate * jnp.where(step < warmup, step / max(1, warmup), factor)

    return schedule


def make_optimizer(training: TrainingConfig, total_steps: int) -> optax.GradientTransformation:
    """Clips by global norm, then AdamW (0.9, 0.999, eps 1e-8) with decoupled decay times the learning rate.

    Equals `torch.nn.utils.clip_grad_norm_` followed by `torch.optim.AdamW` with a transformers schedule. Decay touches
    matrices only (`is_decayed`). The moments are float32 of their parameter's shape; the norm before clipping is
    `optax.tree.norm(gradients)`, for whoever logs it.
    """
    b1, b2 = ADAM_BETAS
    clip = optax.identity() if training.max_grad_norm is None else clip_by_global_norm(training.max_grad_norm)
    return _in_float32(
        optax.chain(
            clip,
            optax.scale_by_adam(b1, b2, ADAM_EPSILON),
            optax.add_decayed_weights(training.weight_decay, mask=_decay_mask),
            optax.scale_by_learning_rate(learning_rate_schedule(training, total_steps)),
        )
    )


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales all gradients by min(1, max_norm / (norm + 1e-6)), torch's rule; optax's own omits the 1e-6."""

    def update(updates: Params, state: optax.EmptyState, params: Any = None) -> tuple[Params, optax.EmptyState]:
        scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + CLIP_EPSILON))
        return jax.tree.map(lambda gradient: gradient * scale, updates), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def is_decayed(path: str) -> bool:
    """Whether weight decay applies to a parameter: matrices and adapters yes; norms and biases no.

    Decided by name: in stacked layers a norm's weight is a two-dimensional [layers, width] array.
    """
    module, _, leaf = path.rpartition("/")
    return leaf != "bias" and not module.endswith("norm")


def optimizer_state_shardings(
    optimizer: optax.GradientTransformation,
    params_abstract: dict[str, jax.ShapeDtypeStruct],
    param_shardings: dict[str, NamedSharding],
    mesh: Mesh,
) -> Any:
    """Shardings for `optimizer.init(params)`: each moment lies as its parameter does, counters are replicated.

    Given to `jax.jit(optimizer.init, out_shardings=...)`. Left to itself jit replicates the moments, which costs
    memory and a second compilation of the step once the first update has resharded them.
    """
    state_abstract = jax.eval_shape(optimizer.init, params_abstract)
    replicated = NamedSharding(mesh, PartitionSpec())
    return optax.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        state_abstract,
        param_shardings,
        transform_non_params=lambda _: replicated,
    )


def _decay_mask(params: Params) -> dict[str, bool]:
    return {path: is_decayed(path) for path in params}


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs a transformation on float32 copies of parameters and gradients: no moment is ever kept in bfloat16."""

    def to_float32(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    def update(updates: Params, state: optax.OptState, params: Params | None = None) -> tuple[Params, optax.OptState]:
        return inner.update(to_float32(updates), state, to_float32(params))

    return optax.GradientTransformation(lambda params: inner.init(to_float32(params)), update)
