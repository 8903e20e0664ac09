"""The end of a training run: an adapter or a model in Hugging Face form, written and verified."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.config.run import RunConfig
from flacuna_jax.config.types import CHECKPOINT
from flacuna_jax.data.conversation import Template
from flacuna_jax.data.tokenization import Tokenizer
from flacuna_jax.huggingface import deliver
from flacuna_jax.huggingface.adapter import Adapter
from flacuna_jax.huggingface.answer_ends import answer_ends
from flacuna_jax.huggingface.card import Facts
from flacuna_jax.huggingface.chat_template import resolve_name
from flacuna_jax.huggingface.files.place import local_checkpoint
from flacuna_jax.huggingface.merged import copy_tokenizer
from flacuna_jax.huggingface.probe import probe_ids
from flacuna_jax.kernels.packed_mask import make_packed_mask
from flacuna_jax.model.parameters import ModelSpec, Params
from flacuna_jax.model.sharding import (
    parameter_shardings,
)
from flacuna_jax.run.facts import setting_rows
from flacuna_jax.run.model import ModelSource
from flacuna_jax.run.setup import Setup
from flacuna_jax.storage.run_directory import RunDirectory
from flacuna_jax.training.state import TrainState


def deliver_result(
    setup: Setup, directory: RunDirectory, state: TrainState, base: Params, last_step: int, mean_loss: float | None
) -> tuple[Path, str]:
    """Writes and verifies `adapter/`, or `model/` after full fine-tuning. `last_step` is that of the run, which may
    have gone on after `state`; `mean_loss` is of its last steps.

    Returns:
      Its directory, and a line for the user; empty on hosts other than the first.
    """
    config = setup.config
    trained = _on_every_host(state.trainable)
    path = directory.path / ("model" if config.lora is None else "adapter")
    if jax.process_index() != 0:
        return path, ""
    if config.lora is None:
        delivery = deliver.write_model(
            path,
            trained,
            setup.source.config,
            companions(config, setup.template, setup.tokenizer),
            dtype=jnp.dtype(config.model.dtype),
            model_source=config.model.path,
            replace=True,
        )
    else:
        rows = setting_rows(config) | {
            "examples": f"{setup.plan.examples:,} per epoch, {len(setup.plan.epochs)} epoch(s)",
            "optimizer steps": f"{state.step:,} of {setup.plan.examples_per_step:.0f} examples",
        }
        if state.step != last_step:
            rows["optimizer steps"] += f"; the best of a run of {last_step:,} steps"
        elif mean_loss is not None:
            rows["training loss"] = f"{mean_loss:.4f}, mean of the last steps"
        if config.data.new_tokens:
            size = setup.source.config.vocab_size
            rows["tables"] = f"{size:,} rows; with PEFT, call base.resize_token_embeddings({size}) first"
        adapter = Adapter(
            adapter_spec(setup.source, config.lora),
            {name: np.asarray(value, np.float32) for name, value in trained.items()},
            config.model.base_name,
            config.model.base_revision,
        )
        alone = jax.process_count() == 1
        delivery = deliver.write_adapter(
            path,
            adapter,
            setup.source.config,
            trained=state.step > 1,
            facts=Facts(rows),
            tokenizer=tokenizer_writer(config, setup.template, setup.tokenizer),
            logits=_logits_on_run(setup, base) if alone else None,
            replace=True,
        )
    return path, f"{delivery.directory}: {delivery.size}, read back and verified against the run"


def adapter_spec(source: ModelSource, lora: LoraConfig) -> ModelSpec:
    """The network of an adapter in files, with the settings that are in the files."""
    return ModelSpec(
        source.config, lora.model_copy(update={"init_from": None, "train_tokens": ()}), tokens=source.tokens
    )


def tokenizer_writer(config: RunConfig, template: Template, tokenizer: Tokenizer) -> Callable[[Path], None]:
    """Writes the tokenizer of a run with new tokens beside its adapter, as PEFT's users do; that of the base is not
    written again."""

    def write(directory: Path) -> None:
        if config.data.new_tokens:
            beside = companions(config, template, tokenizer)
            copy_tokenizer(beside.tokenizer, directory, beside.chat_template, beside.end, beside.new_tokens)

    return write


def what_next(config: RunConfig) -> list[str]:
    """The path of a finished run's report, and useful next commands."""
    run = shlex.quote(config.output_dir)
    lines = {"report": f"{config.output_dir}/report.html"}
    on_disk = config.model.init == "pretrained"
    if on_disk or config.lora is None:
        lines["talk"] = f"flacuna chat --run {run}"
    if on_disk:
        base = "base" if config.lora else shlex.quote(str(config.model.path))
        lines["compare"] = f"flacuna evaluate --run {run} --compare {base} --tasks mmlu --data DIR"
    if on_disk and config.lora:
        lines["merge"] = f"flacuna export {run} OUT --format merged"
    return [f"{label:<10} {text}" for label, text in lines.items()]


def companions(config: RunConfig, template: Template, tokenizer: Tokenizer) -> deliver.Companions:
    """Files of this run's model other than its weights: the tokenizer's files, and the chat template of training unless
    it is the template of the checkpoint."""
    directory = local_checkpoint(config.model.tokenizer_path, weights=False)
    jinja = None if resolve_name(config.data.template, directory) == CHECKPOINT else template.jinja
    token_ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    end = tokenizer.special.spellings[template.ends[0]] if template.ends else None
    ends = answer_ends(template, tokenizer, config.model.path)
    return deliver.Companions(directory, jinja, token_ids, ends, end, template.stop_strings, config.data.new_tokens)


def _on_every_host(params: Params) -> dict[str, Any]:
    """The parameters as arrays that are fully addressable by this process."""
    if jax.process_count() == 1:
        return dict(params)
    return {name: multihost_utils.process_allgather(value, tiled=True) for name, value in params.items()}


def _logits_on_run(setup: Setup, base: Params) -> Callable[[Adapter], np.ndarray]:
    """Computes logits of fixed ids with the run's base and compiled network, for an adapter read from its files."""
    shardings = parameter_shardings(setup.spec.adapters, setup.mesh)
    ids_t = probe_ids(setup.source.config)

    def forward(params: Params, tokens_bt: jax.Array) -> jax.Array:
        model = setup.spec.merge(params)
        mask = make_packed_mask(jnp.ones_like(tokens_bt))
        return model.logits(model(tokens_bt, jnp.arange(tokens_bt.shape[1])[None], mask))[0]

    def logits(adapter: Adapter) -> np.ndarray:
        placed = jax.device_put({name: adapter.params[name] for name in shardings}, shardings)
        with jax.set_mesh(setup.mesh):
            return np.asarray(jax.jit(forward)({**base, **placed}, jnp.asarray(ids_t)[None]))

    return logits
