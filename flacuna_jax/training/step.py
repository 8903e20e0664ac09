"""The optimizer step: one compiled function for adapters and for full fine-tuning, for any number of micro-batches.

    step(trainable, opt_state, frozen, batch, index) -> trainable, opt_state, metrics

`trainable` and `frozen` partition the parameters; only the trainable ones are differentiated, updated and donated. The
sums of the objective (training/objective.py) are added over all micro-batches and devices and divided once by their
weights, so the result does not depend on the split into micro-batches.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from flacuna_jax.compiler import compiler_options
from flacuna_jax.config.run import RunConfig
from flacuna_jax.deviceless import known_options
from flacuna_jax.model.parameters import ModelSpec, Params
from flacuna_jax.model.sharding import constrain, row_shards
from flacuna_jax.model.variables import Parameter
from flacuna_jax.training.guard import skips
from flacuna_jax.training.network import Batch, Network, NetworkConfig
from flacuna_jax.training.objective import SUPERVISED_TOKENS, Objective, Terms, Weighted
from flacuna_jax.training.preference import preference_objective


class StepMetrics(NamedTuple):
    """Scalars of one step, before its update; float32 unless noted otherwise."""

    loss: jax.Array
    """The objective's mean over the step."""
    grad_norm: jax.Array
    """Global norm of the gradient of `loss`, before clipping."""
    skipped: jax.Array
    """Number of bad steps so far, including this one, which changed nothing (training/guard.py). Int32."""
    in_a_row: jax.Array
    """Number of consecutive bad steps up to this one; 0 if this step is good. Int32."""
    scalars: Mapping[str, jax.Array]
    """Means over the step of the objective's other scalars."""


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Static settings of the compiled step."""

    network: NetworkConfig
    seed: int = 0
    objective: Objective = SUPERVISED_TOKENS

    @classmethod
    def of_run(cls, spec: ModelSpec, config: RunConfig) -> "StepConfig":
        return cls(NetworkConfig.of_run(spec, config), config.seed, objective_of(config))

    @property
    def spec(self) -> ModelSpec:
        return self.network.spec

    def with_spec(self, spec: ModelSpec) -> "StepConfig":
        return dataclasses.replace(self, network=dataclasses.replace(self.network, spec=spec))

    def with_remat(self, remat: str) -> "StepConfig":
        return dataclasses.replace(self, network=dataclasses.replace(self.network, remat=remat))


def objective_of(config: RunConfig) -> Objective:
    """The objective that the settings of a run ask for."""
    settings = config.training.objective
    return SUPERVISED_TOKENS if settings is None else preference_objective(settings, config.caches_reference)


def partition(spec: ModelSpec, base: Params, adapters: Params) -> tuple[Params, Params]:
    """(trainable, frozen): the adapters and the base; or, in full fine-tuning, the base and nothing."""
    return (adapters, base) if spec.lora is not None else (base, {})


def loss_and_gradients(
    config: StepConfig, trainable: Params, frozen: Params, batch: Batch, index: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array], Params]:
    """(mean loss of a whole step, means of the objective's scalars, gradient of the loss), all float32.

    The gradient is sharded like `trainable`. Trailing micro-batches with only empty rows are not computed.
    """
    rows_per_micro_batch = batch["segment_ids"].shape[1]
    differentiated = trainable if config.spec.lora is None else _copy_per_shard(config.spec, trainable)
    dropout = config.spec.lora is not None and config.spec.lora.dropout > 0
    step_key = jax.random.fold_in(jax.random.key(config.seed), index)
    live_rows = jnp.sum(jnp.any(batch["segment_ids"] > 0, axis=-1))
    micro_batches = (live_rows + rows_per_micro_batch - 1) // rows_per_micro_batch
    network = config.network.with_params({**frozen, **trainable})
    summed = sum_statistics(config.objective, network, batch, micro_batches)
    statistics = {name: jax.lax.stop_gradient(found.mean()) for name, found in summed.items()}

    def terms(params: Params, accumulation_index: jax.Array) -> Terms:
        micro_batch = {**micro_batch_of(batch, accumulation_index), **statistics}
        row_keys_b = None
        if dropout:
            rows_b = accumulation_index * rows_per_micro_batch + jnp.arange(rows_per_micro_batch)
            row_keys_b = jax.vmap(jax.random.fold_in, (None, 0))(step_key, rows_b)
        return config.objective.terms(config.network.with_params({**frozen, **params}, row_keys_b), micro_batch)

    def summed_loss(params: Params, accumulation_index: jax.Array) -> tuple[jax.Array, Terms]:
        found = terms(params, accumulation_index)
        return found.loss.sum, found

    def accumulate(accumulation_index: jax.Array, carry: tuple[Terms, Params]) -> tuple[Terms, Params]:
        (_, found), gradients = jax.value_and_grad(summed_loss, has_aux=True)(differentiated, accumulation_index)
        return jax.tree.map(jnp.add, carry, (found, gradients))

    of_one = jax.eval_shape(terms, differentiated, jax.ShapeDtypeStruct((), jnp.int32))
    zeros = jax.tree.map(jnp.zeros_like, (of_one, differentiated))
    found, gradients = jax.lax.fori_loop(0, micro_batches, accumulate, zeros)
    if config.spec.lora is not None:
        copied = _copied(config.spec)
        gradients = {path: jnp.sum(g, axis=1) if path in copied else g for path, g in gradients.items()}
    divisor = found.loss.divisor
    gradients = jax.tree.map(lambda gradient: gradient / divisor, gradients)
    return found.loss.mean(), {name: scalar.mean() for name, scalar in found.scalars.items()}, gradients


def micro_batch_of(batch: Batch, index: jax.Array) -> dict[str, jax.Array]:
    return {name: constrain(leaf[index], "batch", None) for name, leaf in batch.items()}


def sum_statistics(
    objective: Objective, network: Network, batch: Batch, micro_batches: jax.Array | int
) -> Mapping[str, Weighted]:
    """The objective's statistics, summed over the first `micro_batches` of a step."""
    statistics = objective.statistics
    if statistics is None:
        return {}

    def of_micro_batch(index: jax.Array) -> Mapping[str, Weighted]:
        return statistics(network, micro_batch_of(batch, index))

    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(of_micro_batch, jax.ShapeDtypeStruct((), jnp.int32)))
    return jax.lax.fori_loop(
        0, micro_batches, lambda index, sums: jax.tree.map(jnp.add, sums, of_micro_batch(index)), zeros
    )


def _copy_per_shard(spec: ModelSpec, adapters: Params) -> Params:
    """[layers, ...] → [layers, shards, ...]: every data×fsdp shard reads its own copy, which has its own gradient.

    Gradients are thus summed locally over all micro-batches, and reduced across devices once per step, in float32. With
    a shared array, the gradient would be reduced in every layer of every micro-batch, in the compute dtype.
    """
    shards = row_shards()
    copies = {}
    for path, parameter in _copied(spec).items():
        value = adapters[path]
        repeated = jnp.broadcast_to(value[:, None], (value.shape[0], shards, *value.shape[1:]))
        copies[path] = constrain(repeated, "layers", "batch", *parameter.layer_axes)
    return adapters | copies


def _copied(spec: ModelSpec) -> dict[str, Parameter]:
    """Adapters of the layers. The adapter of the head is excluded: the loss sums its gradient over devices itself."""
    return {path: parameter for path, parameter in spec.adapters.items() if parameter.stacked}


Step = Callable[[Params, Any, Params, Batch, Any], tuple[Params, Any, StepMetrics]]


def make_step(config: StepConfig, optimizer: optax.GradientTransformation, mesh: Mesh, shardings: Any) -> Step:
    """Returns the jitted step, not yet compiled.

    Args:
      config: static settings.
      optimizer: any optax transformation over the trainable parameters.
      mesh: the device mesh.
      shardings: shardings of (trainable, opt_state); outputs keep those of the inputs, so nothing compiles twice.

    `trainable` and `opt_state` are donated; `frozen` is an argument, never copied into the program.
    """

    update = optax.with_extra_args_support(optimizer).update

    def step(
        trainable: Params, opt_state: Any, frozen: Params, batch: Batch, index: jax.Array
    ) -> tuple[Params, Any, StepMetrics]:
        loss, scalars, gradients = loss_and_gradients(config, trainable, frozen, batch, index)
        updates, opt_state = update(gradients, opt_state, trainable, loss=loss)
        metrics = StepMetrics(loss, optax.tree.norm(gradients), *skips(opt_state), scalars)
        return optax.apply_updates(trainable, updates), opt_state, metrics

    split_weights = mesh.shape["fsdp"] * mesh.shape["tensor"] > 1
    options = known_options(mesh, compiler_options(mesh.devices.flat[0].platform, split_weights))
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*shardings, None), compiler_options=options or None)

    def on_mesh(*arguments: Any) -> tuple[Params, Any, StepMetrics]:
        with jax.set_mesh(mesh):
            return jitted(*arguments)

    on_mesh.jitted = jitted  # type: ignore[attr-defined]  # for ahead-of-time lowering and for counting compilations
    return on_mesh
