"""The optimizer step: one compiled function for adapters and for full fine-tuning, for any number of micro-batches.

    step(trainable, opt_state, frozen, batch, index) -> trainable, opt_state, metrics

`trainable` and `frozen` partition the parameters; only the trainable ones are differentiated, updated and donated. The
loss of a step is the sum over all its supervised tokens, on every device and in every micro-batch, divided once by
their number, so the result does not depend on how the rows were cut up.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from flacuna_jax.compiler import compiler_options
from flacuna_jax.config.schema import RunConfig
from flacuna_jax.deviceless import known_options
from flacuna_jax.kernels.attention import Backend
from flacuna_jax.kernels.cross_entropy import token_losses
from flacuna_jax.model.parameters import ModelSpec, Params
from flacuna_jax.model.sharding import constrain, row_shards
from flacuna_jax.model.variables import Parameter
from flacuna_jax.training.guard import skips

Batch = Mapping[str, jax.Array]
"""tokens, targets, segment_ids, positions int32 and loss_mask bool, each [accumulation, batch, length]."""


class StepMetrics(NamedTuple):
    """Scalars of one step, before its update; float32 where nothing else is said."""

    loss: jax.Array
    """Mean over the step's supervised tokens."""
    grad_norm: jax.Array
    """Global norm of the gradient of `loss`, before clipping."""
    skipped: jax.Array
    """Bad steps so far, this one included; they changed nothing (training/guard.py). Int32, as is the next."""
    in_a_row: jax.Array
    """How many of them came one after the other up to this one; 0 where this step is good."""


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Static settings of the compiled step."""

    spec: ModelSpec
    seed: int
    remat: str = "none"
    attention_backend: Backend = "auto"
    one_document: bool = False
    """No row holds more than one document: what `attention_backend: cudnn` needs."""

    @classmethod
    def of_run(cls, spec: ModelSpec, config: RunConfig) -> "StepConfig":
        training = config.training
        return cls(spec, config.seed, training.remat, training.attention, config.data.packing == "none")


def partition(spec: ModelSpec, base: Params, adapters: Params) -> tuple[Params, Params]:
    """(trainable, frozen): the adapters against the base, or the base against nothing in full fine-tuning."""
    return (adapters, base) if spec.lora is not None else (base, {})


def micro_batch_losses(
    config: StepConfig,
    params: Params,
    batch: Batch,
    row_keys_b: jax.Array | None = None,
    score: Callable[..., Any] = token_losses,
) -> Any:
    """Losses of the supervised tokens of one micro-batch (leaves [batch, length]), float32, zero elsewhere.

    `score` is what is done with hidden states, head, targets and mask: `kernels.cross_entropy.token_scores` tells
    more about each token.
    """
    model = config.spec.merge(params)
    hidden_btd = model(
        batch["tokens"],
        batch["positions"],
        model.mask(batch["segment_ids"], one_document=config.one_document),
        row_keys_b=row_keys_b,
        remat=config.remat,
        attention_backend=config.attention_backend,
    )
    wide_btd = model.before_head(hidden_btd, row_keys_b)
    adapter = wide_btd.shape[-1] - hidden_btd.shape[-1]
    if adapter and score is token_losses:
        score = functools.partial(token_losses, trained_columns=adapter)
    return score(wide_btd, model.head(), batch["targets"], batch["loss_mask"])


def loss_and_gradients(
    config: StepConfig, trainable: Params, frozen: Params, batch: Batch, index: jax.Array
) -> tuple[jax.Array, Params]:
    """Mean loss over the supervised tokens of a whole step and its gradient (float32, sharded like `trainable`).

    Micro-batches at the end that hold only empty rows are not computed.
    """
    rows_per_micro_batch = batch["tokens"].shape[1]
    differentiated = trainable if config.spec.lora is None else _copy_per_shard(config.spec, trainable)
    dropout = config.spec.lora is not None and config.spec.lora.dropout > 0
    step_key = jax.random.fold_in(jax.random.key(config.seed), index)

    def summed_loss(params: Params, accumulation_index: jax.Array) -> jax.Array:
        micro_batch = {name: leaf[accumulation_index] for name, leaf in batch.items()}
        micro_batch = {name: constrain(leaf, "batch", None) for name, leaf in micro_batch.items()}
        row_keys_b = None
        if dropout:
            rows_b = accumulation_index * rows_per_micro_batch + jnp.arange(rows_per_micro_batch)
            row_keys_b = jax.vmap(jax.random.fold_in, (None, 0))(step_key, rows_b)
        return jnp.sum(micro_batch_losses(config, {**frozen, **params}, micro_batch, row_keys_b))

    def accumulate(accumulation_index: jax.Array, carry: tuple[jax.Array, Params]) -> tuple[jax.Array, Params]:
        loss, gradients = jax.value_and_grad(summed_loss)(differentiated, accumulation_index)
        return jax.tree.map(jnp.add, carry, (loss, gradients))

    live_rows = jnp.sum(jnp.any(batch["segment_ids"] > 0, axis=-1))
    micro_batches = (live_rows + rows_per_micro_batch - 1) // rows_per_micro_batch
    zeros = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, differentiated))
    loss, gradients = jax.lax.fori_loop(0, micro_batches, accumulate, zeros)
    if config.spec.lora is not None:
        copied = _copied(config.spec)
        gradients = {path: jnp.sum(g, axis=1) if path in copied else g for path, g in gradients.items()}
    supervised = jnp.maximum(jnp.sum(batch["loss_mask"]), 1).astype(jnp.float32)
    return loss / supervised, jax.tree.map(lambda gradient: gradient / supervised, gradients)


def _copy_per_shard(spec: ModelSpec, adapters: Params) -> Params:
    """[layers, ...] → [layers, shards, ...]: every data×fsdp shard reads, and has the gradient of, a copy of its own.

    So gradients are added up where they arise, over all micro-batches, and cross the devices once per step, in float32.
    One array read by all would have its gradient reduced in every layer of every micro-batch, in compute dtype.
    """
    shards = row_shards()
    copies = {}
    for path, parameter in _copied(spec).items():
        value = adapters[path]
        repeated = jnp.broadcast_to(value[:, None], (value.shape[0], shards, *value.shape[1:]))
        copies[path] = constrain(repeated, "layers", "batch", *parameter.layer_axes)
    return adapters | copies


def _copied(spec: ModelSpec) -> dict[str, Parameter]:
    """Not the head's adapter: the loss adds up its gradient over devices itself."""
    return {path: parameter for path, parameter in spec.adapters.items() if parameter.stacked}


Step = Callable[[Params, Any, Params, Batch, Any], tuple[Params, Any, StepMetrics]]


def make_step(config: StepConfig, optimizer: optax.GradientTransformation, mesh: Mesh, shardings: Any) -> Step:
    """Compiles nothing yet: returns the jitted step.

    Args:
      config: static settings.
      optimizer: any optax transformation over the trainable parameters.
      mesh: the device mesh.
      shardings: of (trainable, opt_state), so that what comes out lies as what went in and nothing compiles twice.

    `trainable` and `opt_state` are donated; `frozen` is an argument, never copied into the program.
    """

    update = optax.with_extra_args_support(optimizer).update

    def step(
        trainable: Params, opt_state: Any, frozen: Params, batch: Batch, index: jax.Array
    ) -> tuple[Params, Any, StepMetrics]:
        loss, gradients = loss_and_gradients(config, trainable, frozen, batch, index)
        updates, opt_state = update(gradients, opt_state, trainable, loss=loss)
        metrics = StepMetrics(loss, optax.tree.norm(gradients), *skips(opt_state))
        return optax.apply_updates(trainable, updates), opt_state, metrics

    split_weights = mesh.shape["fsdp"] * mesh.shape["tensor"] > 1
    options = known_options(mesh, compiler_options(mesh.devices.flat[0].platform, split_weights))
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*shardings, None), compiler_options=options or None)

    def on_mesh(*arguments: Any) -> tuple[Params, Any, StepMetrics]:
        with jax.set_mesh(mesh):
            return jitted(*arguments)

    on_mesh.jitted = jitted  # type: ignore[attr-defined]  # for ahead-of-time lowering and for counting compilations
    return on_mesh
