"""`python -m flacuna_jax.train --config C [--a.b=value ...]`: the main job, from a checkpoint and data to an adapter.

Reads top to bottom: model, data, plan, starting state, loop, export. Every part lives in its room; this file only puts
them together.
"""

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from flacuna_jax import distributed
from flacuna_jax.cli import run_verb
from flacuna_jax.config import DistributedConfig, MeshConfig, RunConfig
from flacuna_jax.config_files import load_config
from flacuna_jax.data.build import build_store
from flacuna_jax.data.conversation import TEMPLATES
from flacuna_jax.data.pipeline import BatchStream, RunPlan, StepSource, check_batch_arithmetic, plan_run
from flacuna_jax.data.report import DataReport
from flacuna_jax.data.store import TokenStore
from flacuna_jax.data.store_cache import cached_store, default_directory
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface import deliver
from flacuna_jax.huggingface.adapter import Adapter, read_adapter
from flacuna_jax.huggingface.load import fingerprint, load_base
from flacuna_jax.huggingface.probe import probe_ids
from flacuna_jax.huggingface.tokenizer import check_vocabulary, load_tokenizer, tokenizer_fingerprint
from flacuna_jax.kernels.packed_mask import make_packed_mask
from flacuna_jax.model.parameters import ModelSpec, Params, count, init_params
from flacuna_jax.model.sharding import (
    batch_sharding,
    check_mesh,
    make_mesh,
    parameter_shardings,
    row_shards,
    split_everywhere,
)
from flacuna_jax.model_source import ModelSource, open_model
from flacuna_jax.planning.search import choose_layout
from flacuna_jax.planning.targets import TARGETS
from flacuna_jax.training.checkpoint import Checkpointer
from flacuna_jax.training.loop import Loop
from flacuna_jax.training.metrics import Throughput, open_tracker
from flacuna_jax.training.optimizer import learning_rate_schedule, make_optimizer
from flacuna_jax.training.progress import open_progress
from flacuna_jax.training.report import environment, mixture_rows, read_metrics, write_report
from flacuna_jax.training.resume import require_same_run, rounding_changes
from flacuna_jax.training.run_directory import RunDirectory, open_run_directory
from flacuna_jax.training.state import StateLayout, TrainState
from flacuna_jax.training.step import StepConfig, make_step, partition
from flacuna_jax.training.step_log import StepLog
from flacuna_jax.version import __version__


def main(argv: Sequence[str] | None = None) -> int | None:
    parser = argparse.ArgumentParser(
        prog="flacuna train",
        description="Fine-tunes a LLaMA: LoRA adapters, or every weight with lora: null.",
        epilog="Any setting of the config can be overridden: --training.epochs=2 --data.sources.0.path=my.jsonl",
    )
    parser.add_argument("--config", required=True, metavar="YAML", help="see configs/")
    arguments, overrides = parser.parse_known_args(argv)
    train(load_config(arguments.config, overrides))
    return None


def train(config: RunConfig) -> None:
    """Runs, or resumes, one training run. Raises `UserError` before anything is written if the input is wrong."""
    distributed.initialize(config.distributed)
    source = open_model(config.model)
    config = resolve_auto(config, source)
    mesh = make_mesh(config.mesh)
    check_mesh(mesh, source.config.num_heads, source.config.num_kv_heads, source.config.intermediate_size)
    shards = row_shards(mesh)
    check_batch_arithmetic(config.training, shards)

    primary = jax.process_index() == 0
    with open_run_directory(config.directory, resume=config.checkpoint.resume, primary=primary) as directory:
        say: Callable[[str], None] = print if primary else lambda _: None
        setup = Setup(config, mesh, source, *_build_data(config, source, shards, say))
        distributed.require_agreement(setup.shared_facts)
        with Checkpointer(
            directory.path, keep=config.checkpoint.keep, asynchronous=config.lora is None
        ) as checkpointer:
            _train(setup, directory, checkpointer, say)


def resolve_auto(config: RunConfig, source: ModelSource) -> RunConfig:
    """Decides what `mesh: auto` and `remat: auto` leave to us.

    A resumed run keeps what it had decided, if the devices are as many. Else the planner compiles a few candidates; on
    accelerators it has no facts of, weights are split over all devices and the results of matrix products kept.
    """
    if config.mesh != "auto" and config.training.remat != "auto":
        return config
    devices = jax.devices()
    previous = config.directory / "config.yaml"
    if previous.is_file() and (decided := load_config(previous)).mesh != "auto" and _uses(decided, len(devices)):
        mesh, remat = decided.mesh, str(decided.training.remat)
    elif devices[0].platform == "cpu" or any(t.device_kind == devices[0].device_kind for t in TARGETS.values()):
        mesh, remat = choose_layout(config, model_spec(config, source), devices)
    else:
        mesh, remat = MeshConfig(fsdp=len(devices)), "dots"
    chosen_mesh = mesh if config.mesh == "auto" else config.mesh
    chosen_remat = remat if config.training.remat == "auto" else config.training.remat
    training = config.training.model_copy(update={"remat": chosen_remat})
    return config.model_copy(update={"mesh": chosen_mesh, "training": training})


def _uses(config: RunConfig, devices: int) -> bool:
    return isinstance(config.mesh, MeshConfig) and config.mesh.devices == devices


def model_spec(config: RunConfig, source: ModelSource) -> ModelSpec:
    """LoRA: float32 adapters beside a base in compute dtype; full fine-tuning: float32 masters of every weight."""
    dtype = config.model.dtype
    return ModelSpec(source.config, config.lora, dtype, dtype if config.lora else "float32")


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a run is made of once its input is known to be right."""

    config: RunConfig
    mesh: Mesh
    source: ModelSource
    store: TokenStore
    report: DataReport
    plan: RunPlan

    @property
    def spec(self) -> ModelSpec:
        return model_spec(self.config, self.source)

    @property
    def schedule(self) -> optax.Schedule:
        return learning_rate_schedule(self.config.training, self.plan.total_steps)

    @property
    def layout(self) -> StateLayout:
        return StateLayout(self.spec, make_optimizer(self.config.training, self.plan.total_steps), self.mesh)

    @functools.cached_property
    def meta(self) -> dict[str, Any]:
        """What a checkpoint must agree with before this run continues it."""
        return {
            "config": self.config.model_dump(mode="json"),
            "fingerprints": {
                "data": self.store.fingerprint(),
                "tokenizer": tokenizer_fingerprint(self.config.model.tokenizer_path),
                "base": fingerprint(self.source.reader, self.source.config) if self.source.reader else "random",
            },
            "rows_per_step": self.plan.rows_per_step,
            "total_steps": self.plan.total_steps,
        }

    @property
    def shared_facts(self) -> dict[str, str]:
        """What all hosts must have in common."""
        config = self.config.model_copy(update={"distributed": DistributedConfig()})
        return {
            "the config": config.to_yaml(),
            "the version of flacuna_jax": __version__,
            "the version of jax": jax.__version__,
            "the data": self.meta["fingerprints"]["data"],
            "the base model": self.meta["fingerprints"]["base"],
            "the tokenizer": self.meta["fingerprints"]["tokenizer"],
        }


def _build_data(
    config: RunConfig, source: ModelSource, shards: int, say: Callable[[str], None]
) -> tuple[TokenStore, DataReport, RunPlan]:
    tokenizer = load_tokenizer(config.model.tokenizer_path)
    check_vocabulary(tokenizer, source.config.vocab_size, config.model.tokenizer_path)
    try:
        tokenizer_hash = tokenizer_fingerprint(config.model.tokenizer_path)
        store, report = cached_store(config.data, tokenizer, tokenizer_hash, default_directory(), say)
    except OSError as error:
        say(f"tokenised data: no cache ({error}); built in memory")
        store, report = build_store(config.data, tokenizer)
    for line in report.lines():
        say(line)
    return store, report, plan_run(store, config.data, config.training, seed=config.seed, shards=shards)


def _train(setup: Setup, directory: RunDirectory, checkpointer: Checkpointer, say: Callable[[str], None]) -> None:
    config, layout, meta = setup.config, setup.layout, setup.meta
    primary = jax.process_index() == 0
    for line in plan_lines(setup):
        say(line)

    # Where the run starts: the newest intact checkpoint > the adapter of lora.init_from > fresh adapters. Without LoRA:
    # the newest checkpoint > the base's weights, or random ones.
    restored = checkpointer.restore(
        layout.trainable,
        layout.opt_state,
        check=lambda saved: require_same_run(saved, meta, directory.path),
        notify=say,
    )
    if restored:
        say(f"resuming after step {restored.step}")
        for change in rounding_changes(restored.meta, meta):
            say(f"note: equal to rounding only, not bit for bit: {change}")
        state = TrainState(restored.step, restored.trainable, restored.opt_state)
        base = _load_weights(setup) if config.lora else {}
    else:
        base = _load_weights(setup)
        trainable, base = partition(setup.spec, base, _first_adapters(setup))
        state = layout.begin(trainable)
    if primary:
        directory.write_config(config.to_yaml())
        directory.cut_metrics_back(state.step)

    source = StepSource(setup.store, setup.plan, jax.process_index(), jax.process_count())
    stream = BatchStream(source, start_step=state.step, threads=2, ahead=4)
    throughput = Throughput()
    started = time.monotonic()
    with (
        open_tracker(
            config.logging, directory.path, config=meta["config"], after_step=state.step, primary=primary
        ) as tracker,
        open_progress(setup.plan.total_steps, state.step, primary=primary) as progress,
    ):

        def save(state: TrainState) -> None:
            tracker.sync()
            with throughput.paused():
                checkpointer.save(state.step, state.trainable, state.opt_state, {**meta, "cursor": stream.cursor()})

        log = StepLog(
            total_steps=setup.plan.total_steps,
            every_steps=config.logging.every_steps,
            schedule=setup.schedule,
            info=source.info,
            tracker=tracker,
            progress=progress,
            throughput=throughput,
        )
        step = make_step(
            StepConfig(setup.spec, config.seed, remat=config.training.remat),
            layout.optimizer,
            setup.mesh,
            layout.shardings,
        )
        loop = Loop(
            step=step,
            frozen=base,
            batches=stream,
            batch_sharding=batch_sharding(setup.mesh),
            total_steps=setup.plan.total_steps,
            observe=log,
            save=save,
            save_every=config.checkpoint.every_steps,
        )
        state = loop.run(state)
        stream.close()
    checkpointer.wait()
    say(f"{state.step} steps done in {time.monotonic() - started:.1f} s")
    say(deliver_result(setup, directory, state, base, log.last_loss))
    if primary:
        write_report(
            directory.report,
            title=directory.path.name,
            records=read_metrics(directory.metrics),
            facts={line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1] for line in plan_lines(setup)},
            mixture=mixture_rows(setup.report),
            config_yaml=config.to_yaml(),
            environment=environment(),
        )


def _load_weights(setup: Setup) -> Params:
    shapes, mesh = setup.spec.base_shapes, setup.mesh
    if setup.source.reader is None:
        return init_params(setup.spec, shapes, setup.config.seed, mesh)
    path = str(setup.config.model.path)
    return load_base(path, setup.source.config, parameter_shardings(shapes, mesh), setup.spec.param_dtype)


def _first_adapters(setup: Setup) -> Params:
    lora = setup.config.lora
    if lora is None or lora.init_from is None:
        return setup.layout.fresh_adapters(setup.config.seed)
    adapter = read_adapter(lora.init_from, setup.source.config)
    for name in ("rank", "alpha", "targets"):
        wanted, found = getattr(lora, name), getattr(adapter.lora, name)
        if (set(wanted) != set(found)) if name == "targets" else (wanted != found):
            raise UserError(f"lora.{name} is {wanted}, the adapter in lora.init_from ({lora.init_from}) has {found}")
    return jax.device_put(adapter.params, parameter_shardings(setup.spec.lora_shapes, setup.mesh))


def plan_lines(setup: Setup) -> list[str]:
    """The exact plan, printed before the first step."""
    config, plan, spec = setup.config, setup.plan, setup.spec
    trainable, total = count(spec.lora_shapes) or count(spec.base_shapes), count(spec.base_shapes)
    axes = " × ".join(f"{axis} {size}" for axis, size in setup.mesh.shape.items())
    kind = setup.mesh.devices.flat[0].device_kind
    epochs = f"{len(plan.epochs)} epoch" + ("s" if len(plan.epochs) > 1 else "")
    return [
        f"model      {total:,} parameters, {trainable:,} trainable ({100 * trainable / total:.3g} %)",
        f"data       {plan.examples:,} examples in {plan.rows:,} rows of {plan.max_length} tokens, "
        f"fill {100 * plan.fill:.2f} %",
        f"steps      {plan.total_steps:,} in {epochs}: {plan.rows_per_step} rows, "
        f"{plan.examples_per_step:.1f} examples each",
        f"devices    {setup.mesh.size} × {kind}: {axes}; {plan.accumulation} micro-batches of {plan.micro_rows} rows, "
        f"remat {config.training.remat}",
        *(f"warning    {warning}" for warning in plan.warnings),
    ]


def deliver_result(
    setup: Setup, directory: RunDirectory, state: TrainState, base: Params, last_loss: float | None
) -> str:
    """Writes and verifies `adapter/` (or `model/` after full fine-tuning); returns a line that says so."""
    config = setup.config
    trained = _on_every_host(state.trainable)
    if jax.process_index() != 0:
        return ""
    if config.lora is None:
        delivery = deliver.write_model(
            directory.path / "model",
            trained,
            setup.source.config,
            _companions(config),
            dtype=jnp.dtype(config.model.dtype),
            model_source=Path(config.model.path) if config.model.path else None,
            replace=True,
        )
    else:
        facts = {
            "data": ", ".join(source.path for source in config.data.sources),
            "examples": f"{setup.plan.examples:,} per epoch, {len(setup.plan.epochs)} epoch(s)",
            "optimizer steps": f"{state.step:,} of {setup.plan.examples_per_step:.0f} examples",
            "learning rate": f"{config.training.learning_rate:g}, {config.training.schedule}, "
            f"{config.training.warmup_steps} warm-up steps",
            "template": config.data.template,
        }
        if last_loss is not None:
            facts["last training loss"] = f"{last_loss:.4f}"
        adapter = Adapter(
            config.lora.model_copy(update={"init_from": None}),
            {name: np.asarray(value, np.float32) for name, value in trained.items()},
            config.model.name or config.model.path,
        )
        alone = jax.process_count() == 1
        delivery = deliver.write_adapter(
            directory.path / "adapter",
            adapter,
            setup.source.config,
            trained=state.step > 1,
            facts=facts,
            logits=_logits_on_run(setup, base) if alone else None,
            replace=True,
        )
    return f"{delivery.directory}: {delivery.nbytes / 1e6:.1f} MB, read back and verified against the run"


def _companions(config: RunConfig) -> deliver.Companions:
    directory = Path(config.model.tokenizer_path)
    tokenizer = load_tokenizer(directory)
    token_ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return deliver.Companions(directory, TEMPLATES[config.data.template].jinja, token_ids)


def _on_every_host(params: Params) -> dict[str, Any]:
    """Arrays that this process can read whole."""
    if jax.process_count() == 1:
        return dict(params)
    return {name: multihost_utils.process_allgather(value, tiled=True) for name, value in params.items()}


def _logits_on_run(setup: Setup, base: Params) -> Callable[[Adapter], np.ndarray]:
    """Logits of fixed ids by the run's own base and compiled network, for an adapter read back from its files."""
    shardings = parameter_shardings(setup.spec.lora_shapes, setup.mesh)
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


if __name__ == "__main__":
    raise SystemExit(run_verb(main))
