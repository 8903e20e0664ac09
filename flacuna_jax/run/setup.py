"""Reads and checks the model, the data and the plan of a training run before anything is written."""

import dataclasses
import functools
import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
import yaml
from jax.sharding import Mesh

from flacuna_jax import distributed
from flacuna_jax.config.files import parse_config
from flacuna_jax.config.model import LoraConfig
from flacuna_jax.config.run import DistributedConfig, MeshConfig, RunConfig
from flacuna_jax.config.types import AUTO, Examples
from flacuna_jax.data.conversation import Template
from flacuna_jax.data.pipeline import RunPlan, check_batch_arithmetic, plan_steps
from flacuna_jax.data.report import DataReport
from flacuna_jax.data.store import TokenStore
from flacuna_jax.data.tokenization import Tokenizer
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface import names
from flacuna_jax.huggingface.adapter import Adapter, read_adapter
from flacuna_jax.huggingface.chat_template import resolve_name
from flacuna_jax.huggingface.files.read import note_on_quantisation
from flacuna_jax.huggingface.load import fingerprint, load_base
from flacuna_jax.huggingface.tokenizer import check_vocabulary, load_tokenizer, tokenizer_fingerprint
from flacuna_jax.kernels.attention import require_backend
from flacuna_jax.model.parameters import ModelSpec, Params, count, init_params, quantize
from flacuna_jax.model.sharding import (
    check_mesh,
    idle_devices,
    make_mesh,
    parameter_shardings,
    row_shards,
    split_everywhere,
)
from flacuna_jax.planning.compute_dtype import DTYPES, ChosenDtype, choose_dtype, with_dtype
from flacuna_jax.planning.search import choose_layout
from flacuna_jax.planning.targets import known_target
from flacuna_jax.run.code_version import (
    code_fingerprints,
    compiler_settings,
    library_versions,
    package_fingerprint,
)
from flacuna_jax.run.data import read_data
from flacuna_jax.run.model import ModelSource, context_warning, open_model
from flacuna_jax.say import Say
from flacuna_jax.storage.bucket import is_bucket, read_text
from flacuna_jax.storage.checkpoint import checksum, list_checkpoints
from flacuna_jax.storage.local_run import local_run
from flacuna_jax.training.network import REFERENCE
from flacuna_jax.training.objective import Objective
from flacuna_jax.training.optimizer import learning_rate_schedule, make_optimizer, require_words
from flacuna_jax.training.state import StateLayout
from flacuna_jax.training.step import StepConfig

_REFERENCE_KEY, _INIT_KEY = "training.objective.reference.adapter", "lora.init_from"


class Parts(NamedTuple):
    """A run before its data: the resolved config, the model's sizes and files, the mesh."""

    config: RunConfig
    source: ModelSource
    mesh: Mesh
    dtype: ChosenDtype | None
    """What `dtype: auto` was replaced by; None if the config names the dtype."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """The checked inputs of a run."""

    config: RunConfig
    mesh: Mesh
    source: ModelSource
    store: TokenStore
    report: DataReport
    plan: RunPlan
    tokenizer: Tokenizer
    template: Template
    dtype: ChosenDtype | None = None
    """What `dtype: auto` was replaced by; None if the config names the dtype."""
    held_out: TokenStore | None = None
    """Records for evaluation that are not trained on."""
    objective: Objective | None = None
    """Replaces the one that the settings ask for."""

    @property
    def step_config(self) -> StepConfig:
        made = StepConfig.of_run(self.spec, self.config)
        return made if self.objective is None else dataclasses.replace(made, objective=self.objective)

    @property
    def spec(self) -> ModelSpec:
        return self.source.spec(self.config)

    @property
    def schedule(self) -> optax.Schedule:
        return learning_rate_schedule(self.config.training, self.plan.total_steps)

    @property
    def layout(self) -> StateLayout:
        spec = self.spec
        return StateLayout(spec, make_optimizer(self.config.training, self.plan.total_steps, spec.trainable), self.mesh)

    @functools.cached_property
    def meta(self) -> dict[str, Any]:
        """Facts that are compared with a checkpoint before this run continues from it."""
        return {
            "config": self.config.model_dump(mode="json"),
            "fingerprints": {
                "data": self.store.fingerprint,
                "tokenizer": tokenizer_fingerprint(self.config.model.tokenizer_path, self.config.data.new_tokens),
                "base": fingerprint(self.source.reader, self.source.config) if self.source.reader else "random",
                "code": code_fingerprints(),
                **self._reference,
            },
            "libraries": library_versions(),
            "device": self.mesh.devices.flat[0].device_kind,
            "compiler": compiler_settings(),
            "rows_per_step": self.plan.rows_per_step,
            "total_steps": self.plan.total_steps,
            **({} if self.objective is None else {"objective": self.objective.name}),
        }

    @property
    def _reference(self) -> dict[str, str]:
        """The adapter that a run begins with, if its log-probabilities are the reference."""
        lora = self.config.lora
        if lora is None or lora.init_from is None or not self.config.caches_reference:
            return {}
        return {"reference": checksum(_adapter_of_run(self, lora.init_from, _INIT_KEY))}

    @property
    def shared_facts(self) -> dict[str, str]:
        """Facts that must be equal on all hosts."""
        config = self.config.model_copy(update={"distributed": DistributedConfig()})
        return {
            "the config": config.to_yaml(),
            "the code of flacuna_jax": package_fingerprint(),
            "the version of jax": jax.__version__,
            "the data": self.meta["fingerprints"]["data"],
            "the base model": self.meta["fingerprints"]["base"],
            "the tokenizer": self.meta["fingerprints"]["tokenizer"],
        }


def resolve_dtype(config: RunConfig) -> tuple[RunConfig, ChosenDtype | None]:
    """Replaces `dtype: auto` by a dtype, the same on all hosts.

    A resumed run keeps its earlier choice, also on another machine: it would change all later numbers.
    """
    if config.model.dtype != AUTO:
        return config, None
    decided = _decided_before(config)
    before = AUTO if decided is None else decided.model.dtype
    chosen = choose_dtype(jax.devices()) if before == "auto" else ChosenDtype(before, "auto: as this run began")
    # CPUs of several hosts may differ; only host 0 prints its reason.
    first = DTYPES[distributed.of_first_host(DTYPES.index(chosen.name))]
    return with_dtype(config, first), dataclasses.replace(chosen, name=first)


def resolve_auto(config: RunConfig, source: ModelSource) -> RunConfig:
    """Replaces `mesh: auto` and `remat: auto` by concrete values.

    A resumed run keeps its earlier choice if the number of devices is the same. Otherwise the planner compiles a few
    candidates; on accelerators without a data sheet, weights are split over all devices, and the results of matrix
    products are kept.
    """
    if config.mesh != "auto" and config.training.remat != "auto":
        return config
    devices = jax.devices()
    decided = _decided_before(config)
    if decided is not None and _uses(decided, len(devices)):
        mesh, remat = decided.mesh, str(decided.training.remat)
    elif devices[0].platform == "cpu" or known_target(devices[0]):
        mesh, remat = choose_layout(config, source.spec(config), devices)
    else:
        mesh, remat = split_everywhere(devices), "dots"
    chosen_mesh = mesh if config.mesh == "auto" else config.mesh
    chosen_remat = remat if config.training.remat == "auto" else config.training.remat
    training = config.training.model_copy(update={"remat": chosen_remat})
    return config.model_copy(update={"mesh": chosen_mesh, "training": training})


def _decided_before(config: RunConfig) -> RunConfig | None:
    """The settings of the run in `output_dir`. None without a run, or if its config.yaml is damaged or has settings
    with old names. That is not an error, because checkpoints contain the settings too."""
    text = read_text(config.output_dir, "config.yaml")
    try:
        tree = yaml.safe_load(text or "")
        return parse_config(tree) if isinstance(tree, dict) else None
    except (UserError, yaml.YAMLError):
        return None


def _uses(config: RunConfig, devices: int) -> bool:
    return isinstance(config.mesh, MeshConfig) and config.mesh.devices == devices


def open_parts(config: RunConfig) -> Parts:
    """Raises UserError if the model is missing, or if the devices do not fit the model, the batch or the attention."""
    source = open_model(config)
    config, dtype = resolve_dtype(config)
    spec = source.spec(config)
    require_words(config.training.no_decay, spec.base | spec.adapters)
    require_backend(
        config.training.attention,
        source.config.head_dim,
        config.model.dtype,
        jax.default_backend(),
        jax.devices()[0].device_kind,
        config.data.packing == "none" and not source.config.windows_differ,
        source.config.attention_softcap,
    )
    config = resolve_auto(config, source)
    template = resolve_name(config.data.template, config.model.tokenizer_path)
    config = config.model_copy(update={"data": config.data.model_copy(update={"template": template})})
    mesh = make_mesh(config.mesh)
    check_mesh(mesh, source.config.num_heads, source.config.num_kv_heads, source.config.intermediate_size)
    check_batch_arithmetic(config.training, row_shards(mesh))
    return Parts(config, source, mesh, dtype)


def require_output_apart(config: RunConfig) -> None:
    """Raises UserError if output_dir is inside a directory of data: the next start would read its files as data."""
    sources = (*config.data.sources, *(config.evaluation.sources if config.evaluation else ()))
    for source in () if is_bucket(config.output_dir) else sources:
        # Not Path.resolve, which raises on circular links.
        if Path(os.path.realpath(config.output_dir)).is_relative_to(os.path.realpath(_read_below(source.path))):
            raise UserError(
                f"output_dir {config.output_dir} is inside {source.path}, whose files are all read as data; "
                "choose another output_dir, or list the data files in data.sources"
            )


def _read_below(path: str) -> str:
    """The path whose files, at any depth, may be read for a source."""
    if Path(path).exists() or "**" not in path:
        return path
    return os.path.dirname(path.partition("**")[0]) or "."


def set_up(parts: Parts, say: Say, objective: Objective | None = None) -> Setup:
    """Adds data and plan, which are the same on all hosts. Raises UserError if they are invalid."""
    config, source, mesh, dtype = parts
    tokenizer = load_tokenizer(config.model.tokenizer_path, config.data.new_tokens)
    check_vocabulary(tokenizer, source.config.vocab_size, config.model.tokenizer_path)
    if config.model.path is not None and (note := note_on_quantisation(config.model.path)):
        say(f"note: {note}")
    data = read_data(config, say, tokenizer=tokenizer)
    plan = plan_steps(data.store, config.data, config.training, seed=config.seed, shards=row_shards(mesh))
    setup = Setup(
        config, mesh, source, data.store, data.report, plan, tokenizer, data.template, dtype, data.held_out, objective
    )
    distributed.require_agreement(setup.shared_facts)
    return setup


def peak_flops() -> float | None:
    """Dense bfloat16 FLOP/s of all devices together; None for a chip without a data sheet in this package."""
    devices = jax.devices()
    target = known_target(devices[0])
    return None if target is None else target.bf16_flops * len(devices)


def load_weights(setup: Setup) -> Params:
    """The base, and the adapter of the reference if there is one, under names that begin with `REFERENCE`."""
    spec, mesh = setup.spec, setup.mesh
    reference: Params = {}
    if (directory := setup.config.reference_adapter) is not None:  # first, because loading the base can take minutes
        adapter = _adapter_of_run(setup, directory, _REFERENCE_KEY)
        reference = {REFERENCE + path: value for path, value in adapter.items()}
    if setup.source.reader is None:
        base = init_params(spec, spec.held, setup.config.seed, mesh)
    else:
        shardings = parameter_shardings(spec.base, mesh)
        keep = functools.partial(quantize, spec, mesh)
        base = load_base(setup.source.reader, setup.source.config, shardings, spec.param_dtype, keep=keep)
    return {**base, **reference}


def first_adapters(setup: Setup, base: Params) -> Params:
    lora = setup.config.lora
    if lora is None:
        return {}
    if lora.init_from is None:
        return setup.layout.fresh_adapters(setup.config.seed, base)
    return _adapter_of_run(setup, lora.init_from, _INIT_KEY)


def require_adapters(setup: Setup) -> None:
    """Raises UserError if a new run would begin with, or refer to, an adapter of another base or with other settings.

    Called before the run writes. A run with checkpoints does not read the adapter that it began with.
    """
    config = setup.config
    if config.lora is None or list_checkpoints(config.output_dir):
        return
    for directory, key in ((config.reference_adapter, _REFERENCE_KEY), (config.lora.init_from, _INIT_KEY)):
        if directory is not None:
            _read_adapter_of_run(setup, directory, key)


def _adapter_of_run(setup: Setup, directory: str, key: str) -> Params:
    adapter = _read_adapter_of_run(setup, directory, key)
    return jax.device_put(adapter.params, parameter_shardings(setup.spec.adapters, setup.mesh))


def _read_adapter_of_run(setup: Setup, directory: str, key: str) -> Adapter:
    """An adapter with the settings of the run. Raises UserError for one of another base or with other settings."""
    assert setup.config.lora is not None, "validated"
    try:
        adapter = read_adapter(local_run(directory), setup.source.config, setup.source.reader)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    if adapter.changes is not None:
        changed = names.some(list(adapter.changes.by_tensor) or ["a tied head"], 3)
        raise UserError(
            f"{key}: {directory} changes the base ({changed}); merge it first, with `flacuna export OUT "
            "--format merged --adapter DIR --model BASE`, and train a new adapter of the result"
        )
    _require_same_adapters(setup.config.lora, adapter.lora, f"{key} ({directory})")
    if adapter.spec.tokens != setup.spec.tokens:
        raise UserError(
            f"{key}: {directory} has rows of {adapter.spec.tokens}, but this run trains "
            f"{setup.spec.tokens}; set lora.train_tokens to the ids of the adapter"
        )
    return adapter


def _require_same_adapters(lora: LoraConfig, found: LoraConfig, where: str) -> None:
    """Raises UserError with the options that set every setting that differs."""
    ours, theirs = lora.model_dump(mode="json"), found.model_dump(mode="json")
    changes = [
        shlex.quote(f"--lora.{name}={json.dumps(theirs[name])}")
        for name in LoraConfig.model_fields
        if name not in ("dropout", "init_from", "train_tokens")
        and ((set(ours[name]) != set(theirs[name])) if name == "targets" else (ours[name] != theirs[name]))
    ]
    if changes:
        raise UserError(f"the adapter in {where} has other settings; set them with: {' '.join(changes)}")


def plan_facts(setup: Setup) -> list[tuple[str, str]]:
    """The plan as (label, text) pairs, printed before the first step; the label "warning" may repeat."""
    config, plan, spec = setup.config, setup.plan, setup.spec
    trainable, total = spec.trainable_count, count(spec.base_shapes)
    axes = " × ".join(f"{axis} {size}" for axis, size in setup.mesh.shape.items())
    kind = setup.mesh.devices.flat[0].device_kind
    epochs = f"{len(plan.epochs)} epoch" + ("s" if len(plan.epochs) > 1 else "")
    return [
        ("model", f"{total:,} parameters, {trainable:,} trainable ({100 * trainable / total:.3g} %)"),
        (
            "data",
            f"{plan.examples:,} {_NAMES[setup.store.examples]} in {plan.rows:,} rows of {plan.max_length} tokens, "
            f"fill {100 * plan.fill:.2f} %",
        ),
        (
            "steps",
            f"{plan.total_steps:,} in {epochs}, {_counted(plan.rows_per_step, 'row')} each; "
            f"{_NAMES[setup.store.examples]} per step: {plan.examples_of_a_step}",
        ),
        (
            "devices",
            f"{setup.mesh.size} × {kind}: {axes}; {_counted(plan.accumulation, 'micro-batch', 'es')} of "
            f"{_counted(plan.micro_rows, 'row')}, remat {config.training.remat}",
        ),
        *([] if setup.dtype is None else [("dtype", str(setup.dtype))]),
        *(("warning", warning) for warning in _warnings(setup)),
    ]


_NAMES: Mapping[Examples, str] = {"answers": "examples", "pairs": "pairs", "labelled": "labelled answers"}


def _counted(count: int, what: str, plural: str = "s") -> str:
    return f"{count} {what}{plural if count != 1 else ''}"


def _warnings(setup: Setup) -> Sequence[str]:
    warnings = [*setup.plan.warnings, *idle_devices(setup.mesh.size, jax.device_count())]
    if too_long := context_warning(setup.spec.config, setup.config.data.max_length):
        warnings.append(too_long)
    return warnings
