"""Optimizers by name, with schedule, clipping by global norm, and weight decay and learning rates by parameter name.

Parameters, gradients and moments are flat dicts `{"layers/q_proj/lora_a": array, ...}`. Everything here computes in
float32, whatever the dtype of the parameters.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flacuna_jax.config.training import TrainingConfig
from flacuna_jax.errors import UserError
from flacuna_jax.model.variables import Parameter
from flacuna_jax.training.guard import guarded

Params = dict[str, jax.Array]
Parameters = Mapping[str, Parameter]

ADAM_BETAS = (0.9, 0.999)
ADAM_EPSILON = 1e-8
LION_BETAS = (0.9, 0.99)
# torch.nn.utils.clip_grad_norm_ divides by (norm + 1e-6), so a gradient at a limit of 1 shrinks by a millionth.
CLIP_EPSILON = 1e-6
INVERSE_SQRT_STEPS = 10_000
"""Time scale of inverse_sqrt without warm-up, as in transformers."""


def learning_rate_schedule(training: TrainingConfig, total_steps: int) -> optax.Schedule:
    """Learning rate of each step, float32: the schedules of the same names in transformers.

    Step s = 0 is the first update. Warm-up is linear and starts at exactly 0: with w warm-up steps, step s < w has
    s / w of the peak. cosine, linear and warmup_stable_decay reach `final_ratio` of the peak at `total_steps`, one step
    after the last update; warmup_stable_decay stays at the peak until `decay_steps` before.
    """
    warmup, final = training.warmup_of(total_steps), training.final_ratio
    falling = max(1, min(training.decay_steps or total_steps, total_steps - warmup))

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        left = jnp.minimum((total_steps - step) / falling, 1.0)
        # (1 + cos(pi (1 - left))) / 2, in a form without cancellation for rates near 0.
        cosine = final + (1 - final) * jnp.sin(0.5 * jnp.pi * left) ** 2
        scale = warmup or INVERSE_SQRT_STEPS
        factor = {
            "cosine": cosine,
            "warmup_stable_decay": cosine,
            "linear": final + (1 - final) * jnp.maximum(0.0, left),
            "constant": jnp.float32(1.0),
            "inverse_sqrt": jax.lax.rsqrt((step + scale - warmup) / scale),
        }[training.schedule]
        return training.learning_rate * jnp.where(step < warmup, step / max(1, warmup), factor)

    return schedule


def make_optimizer(
    training: TrainingConfig, total_steps: int, parameters: Parameters
) -> optax.GradientTransformationExtraArgs:
    """Clips by global norm, then applies AdamW, Adafactor or Lion with decoupled weight decay times the learning rate,
    all wrapped in the guard against bad steps.

    AdamW (eps 1e-8) equals `torch.nn.utils.clip_grad_norm_` followed by `torch.optim.AdamW` with a transformers
    schedule. Weight decay does not apply to `training.no_decay`; `training.lora_plus_ratio` multiplies the learning
    rate of B. Moments are float32. To log the norm before clipping, use `optax.tree.norm(gradients)`.

    Args:
      training: settings.
      total_steps: length of the schedule.
      parameters: trainable parameters by path (`ModelSpec.trainable`).
    """
    clip = optax.identity() if training.max_grad_norm is None else clip_by_global_norm(training.max_grad_norm)
    decayed = {path: is_decayed(path, parameter, training.no_decay) for path, parameter in parameters.items()}
    named = optax.chain(
        clip,
        _CORES[training.optimizer](training, parameters),
        optax.add_decayed_weights(training.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(learning_rate_schedule(training, total_steps)),
        _lora_plus(training.lora_plus_ratio, parameters),
    )
    return guarded(_in_float32(named), training.spike_factor)


def _adam(training: TrainingConfig, _: Parameters) -> optax.GradientTransformation:
    """Kingma & Ba, 2015 (arXiv:1412.6980)."""
    return optax.scale_by_adam(*(training.betas or ADAM_BETAS), ADAM_EPSILON)


def _lion(training: TrainingConfig, _: Parameters) -> optax.GradientTransformation:
    """Chen et al., 2023 (arXiv:2302.06675)."""
    return optax.scale_by_lion(*(training.betas or LION_BETAS))


def _adafactor(_: TrainingConfig, parameters: Parameters) -> optax.GradientTransformation:
    """Shazeer & Stern, 2018 (arXiv:1804.04235), with an external learning rate and no momentum.

    Matrices with both dimensions of at least 128 keep row and column means of their second moments; other parameters
    keep all second moments.
    """
    return _by_layer(optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)), parameters)


_CORES: dict[str, Callable[[TrainingConfig, Parameters], optax.GradientTransformation]] = {
    "adamw": _adam,
    "adafactor": _adafactor,
    "lion": _lion,
}


def _by_layer(inner: optax.GradientTransformation, parameters: Parameters) -> optax.GradientTransformation:
    """Applies a transformation of whole matrices separately to each layer of a stack."""
    stacked = optax.GradientTransformation(jax.vmap(inner.init), jax.vmap(inner.update))
    kinds = {path: "layers" if parameter.stacked else "single" for path, parameter in parameters.items()}
    return optax.partition({"layers": _unless_empty(stacked), "single": inner}, kinds)


def _unless_empty(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Skips trees without arrays, which `jax.vmap` rejects."""

    def init(params: Any) -> Any:
        return inner.init(params) if jax.tree.leaves(params) else ()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return inner.update(updates, state, params) if jax.tree.leaves(updates) else (updates, state)

    return optax.GradientTransformation(init, update)


def _lora_plus(ratio: float, parameters: Parameters) -> optax.GradientTransformation:
    """PEFT's parameter groups: B and vectors (DoRA's magnitudes) have `ratio` times the learning rate of A."""
    faster = {path for path, parameter in parameters.items() if parameter.kind in ("lora_b", "lora_magnitude")}

    def rescale(updates: Params, params: Any = None) -> Params:
        del params
        return {path: u * ratio if path in faster else u for path, u in updates.items()}

    return optax.identity() if ratio == 1 else optax.stateless(rescale)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales all gradients by min(1, max_norm / (norm + 1e-6)) as torch does; optax's function omits the 1e-6."""

    def update(updates: Params, state: optax.EmptyState, params: Any = None) -> tuple[Params, optax.EmptyState]:
        scale = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + CLIP_EPSILON))
        return jax.tree.map(lambda gradient: gradient * scale, updates), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def is_decayed(path: str, parameter: Parameter, no_decay: Sequence[str] = TrainingConfig().no_decay) -> bool:
    """Whether weight decay applies to a parameter: no word of `no_decay` is its kind or a part of its path.

    The number of dimensions cannot decide this: in stacked layers, a norm's weight is a [layers, width] array.
    """
    return not any(word in path or word == parameter.kind for word in no_decay)


def require_words(no_decay: Sequence[str], parameters: Parameters) -> None:
    """Raises UserError for a word, other than the defaults, that excludes no parameter from weight decay."""
    for word in set(no_decay) - set(TrainingConfig().no_decay):
        if all(is_decayed(path, parameter, (word,)) for path, parameter in parameters.items()):
            raise UserError(f"training.no_decay: no name contains {word!r}; names are {', '.join(parameters)}")


def optimizer_state_shardings(
    optimizer: optax.GradientTransformation,
    params_abstract: dict[str, jax.ShapeDtypeStruct],
    param_shardings: dict[str, NamedSharding],
    mesh: Mesh,
) -> Any:
    """Shardings for `optimizer.init(params)`: each moment is sharded like its parameter, counters are replicated.

    If a moment has fewer dimensions (Adafactor's means), each of them is sharded like the first remaining dimension of
    the parameter with the same size. For `jax.jit(optimizer.init, out_shardings=...)`: without it, jit replicates the
    moments, which costs memory and a second compilation of the step after the first update has resharded them.
    """

    def sharding(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        name = next((key.key for key in path if getattr(key, "key", None) in params_abstract), None)
        if name is None:
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, _spec_of_moment(leaf.shape, params_abstract[name].shape, param_shardings[name].spec))

    return jax.tree_util.tree_map_with_path(sharding, jax.eval_shape(optimizer.init, params_abstract))


def _spec_of_moment(shape: tuple[int, ...], param_shape: tuple[int, ...], spec: PartitionSpec) -> PartitionSpec:
    if shape == param_shape:
        return spec
    axes = [*spec, *(None,) * (len(param_shape) - len(spec))]
    chosen, begin = [], 0
    for size in shape:
        found = next((i for i in range(begin, len(param_shape)) if param_shape[i] == size), None)
        chosen.append(None if found is None else axes[found])
        begin = begin if found is None else found + 1
    return PartitionSpec(*chosen)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs a transformation on float32 copies of parameters and gradients, so that moments are never bfloat16."""

    def to_float32(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    def update(updates: Params, state: optax.OptState, params: Params | None = None) -> tuple[Params, optax.OptState]:
        return inner.update(to_float32(updates), state, to_float32(params))

    return optax.GradientTransformation(lambda params: inner.init(to_float32(params)), update)
