"""What a training run is made of: model, data and plan, read and checked before anything is written."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from flacuna_jax.config import DistributedConfig, LoraConfig, MeshConfig, RunConfig
from flacuna_jax.config_files import load_config
from flacuna_jax.data.build import build_store
from flacuna_jax.data.hub import local_sources
from flacuna_jax.data.pipeline import RunPlan, plan_run
from flacuna_jax.data.report import DataReport
from flacuna_jax.data.store import TokenStore
from flacuna_jax.data.store_cache import cached_store, default_directory
from flacuna_jax.distributed import code_fingerprint
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.adapter import read_adapter
from flacuna_jax.huggingface.load import fingerprint, load_base
from flacuna_jax.huggingface.tokenizer import check_vocabulary, load_tokenizer, tokenizer_fingerprint
from flacuna_jax.model.parameters import ModelSpec, Params, count, init_params
from flacuna_jax.model.sharding import parameter_shardings, split_everywhere
from flacuna_jax.model_source import ModelSource
from flacuna_jax.planning.search import choose_layout
from flacuna_jax.planning.targets import TARGETS
from flacuna_jax.training.optimizer import learning_rate_schedule, make_optimizer
from flacuna_jax.training.state import StateLayout


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
            "the code of flacuna_jax": code_fingerprint(),
            "the version of jax": jax.__version__,
            "the data": self.meta["fingerprints"]["data"],
            "the base model": self.meta["fingerprints"]["base"],
            "the tokenizer": self.meta["fingerprints"]["tokenizer"],
        }


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
        mesh, remat = split_everywhere(devices), "dots"
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


def build_data(
    config: RunConfig, source: ModelSource, shards: int, say: Callable[[str], None]
) -> tuple[TokenStore, DataReport, RunPlan]:
    tokenizer = load_tokenizer(config.model.tokenizer_path)
    check_vocabulary(tokenizer, source.config.vocab_size, config.model.tokenizer_path)
    data = local_sources(config.data, default_directory() / "downloads")
    try:
        tokenizer_hash = tokenizer_fingerprint(config.model.tokenizer_path)
        store, report = cached_store(data, tokenizer, tokenizer_hash, default_directory(), say)
    except OSError as error:
        say(f"tokenised data: no cache ({error}); built in memory")
        store, report = build_store(data, tokenizer)
    for line in report.lines():
        say(line)
    return store, report, plan_run(store, config.data, config.training, seed=config.seed, shards=shards)


def load_weights(setup: Setup) -> Params:
    shapes, mesh = setup.spec.base_shapes, setup.mesh
    if setup.source.reader is None:
        return init_params(setup.spec, shapes, setup.config.seed, mesh)
    path = str(setup.config.model.path)
    return load_base(path, setup.source.config, parameter_shardings(shapes, mesh), setup.spec.param_dtype)


def first_adapters(setup: Setup, base: Params) -> Params:
    lora = setup.config.lora
    if lora is None:
        return {}
    if lora.init_from is None:
        return setup.layout.fresh_adapters(setup.config.seed, base)
    adapter = read_adapter(lora.init_from, setup.source.config)
    for name in LoraConfig.model_fields.keys() - {"dropout", "init_from"}:
        wanted, found = getattr(lora, name), getattr(adapter.lora, name)
        if (set(wanted) != set(found)) if name == "targets" else (wanted != found):
            raise UserError(f"lora.{name} is {wanted}, the adapter in lora.init_from ({lora.init_from}) has {found}")
    return jax.device_put(adapter.params, parameter_shardings(setup.spec.lora_shapes, setup.mesh))


def plan_lines(setup: Setup) -> list[str]:
    """The exact plan, printed before the first step."""
    config, plan, spec = setup.config, setup.plan, setup.spec
    trainable, total = spec.trainable_count, count(spec.base_shapes)
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
