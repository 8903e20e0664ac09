"""Predicts what a run needs on hardware that may be absent, from compiling the trainer's own step for it."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from rich.console import Console

from flacuna_jax.config.files import require_config
from flacuna_jax.config.run import RunConfig
from flacuna_jax.config.types import AUTO
from flacuna_jax.data.held_out import hold_out
from flacuna_jax.data.pipeline import check_batch_arithmetic, plan_steps
from flacuna_jax.data.store_cache import default_directory
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.architecture import read_architecture
from flacuna_jax.huggingface.chat_template import open_template
from flacuna_jax.huggingface.files.place import local_checkpoint
from flacuna_jax.huggingface.tokenizer import load_tokenizer
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.model.sharding import check_tensor_parallelism, idle_devices
from flacuna_jax.model.token_rows import NO_TOKENS
from flacuna_jax.planning.calibration import Factors, new_calibration, write_calibration
from flacuna_jax.planning.compute_dtype import choose_dtype, with_dtype
from flacuna_jax.planning.llama import LLAMA
from flacuna_jax.planning.measure import calibration_cases, measure_cases
from flacuna_jax.planning.plans import Plan, compiled_plan, default_layout, estimated_plan
from flacuna_jax.planning.report import plan_table, ranking_table, write_html
from flacuna_jax.planning.search import choices, nearest_fit, search
from flacuna_jax.planning.targets import CompilerUnusable, Machine, absent_devices, parse_target, present_machine
from flacuna_jax.planning.workload import Statistics, Workload, assumed_statistics, measured_statistics
from flacuna_jax.run.data import cached_corpus
from flacuna_jax.run.model import architecture_sizes, trained_tokens, with_new_tokens, with_rope_scaling

Note = Callable[[str], None]

LLAMA_SIZES = {name: LlamaConfig(*numbers) for name, numbers in LLAMA.items()}


def run(arguments: argparse.Namespace, config: RunConfig) -> None:
    notes = Console(stderr=True, soft_wrap=True)
    planned = plan_run(
        config,
        arguments.target,
        search_layouts=arguments.search,
        estimate=arguments.estimate,
        sizes=arguments.sizes,
        examples=arguments.examples,
        note=lambda text: notes.print(text, style="dim", markup=False, highlight=False),
    )
    if arguments.html:
        write_html(arguments.html, planned.plans)
    if arguments.json:
        documents = [plan.to_json(arguments.price) for plan in planned.plans]
        document = {"plans": documents} if arguments.search else documents[0]
        nearest = planned.nearest_fit
        print(json.dumps({**document, "nearest_fit": nearest and nearest.to_json(arguments.price)}, indent=2))
    else:
        _print(planned, arguments)


def calibrate(say: Note) -> None:
    """Measures steps on the devices of this machine, and keeps the factors of their seconds for later plans."""
    devices = jax.devices()
    measured = measure_cases(calibration_cases(), say)
    calibration = new_calibration(devices, measured)
    for dtype, factors in calibration.factors.items():
        errors = [abs(one.predicted(factors) / one.seconds - 1) for one in measured[dtype]]
        say(f"{dtype}: {_rates(factors)}; these steps are met within {100 * max(errors):.0f} %")
    say(f"{calibration.origin}: {write_calibration(calibration)}")


def _rates(factors: Factors) -> str:
    rates = (
        (factors.seconds_per_flop, 1e-9, "GFLOP/s"),
        (factors.seconds_per_byte, 1e-9, "GB/s through memory"),
    )
    told = [f"{unit / seconds:,.0f} {name}" for seconds, unit, name in rates if seconds]
    return ", ".join([*told, f"{1e3 * factors.overhead:.1f} ms per step"])


class Planned(NamedTuple):
    """Plans of a run on a machine."""

    plans: list[Plan]
    """As configured: one. Of a search: the best first."""
    nearest_fit: Plan | None
    """If the first plan does not fit: the layout closest to it that does, if there is one."""
    machine: Machine


def plan_run(
    config: RunConfig,
    target: str | None = None,
    *,
    search_layouts: bool = False,
    estimate: bool = False,
    sizes: str | None = None,
    examples: int | None = None,
    note: Note = lambda _: None,
) -> Planned:
    """Predicts memory and time of a run on a machine, by compiling the trainer's own step for it.

    Args:
      config: of the run. Where its model or data are not on this machine, their sizes are assumed, with a note.
      target: "4xA6000", "v5p:4x4x8", ...; None: the devices of this machine. Planning for another machine sets JAX's
        platform to "cpu" for the whole process.
      search_layouts: plan combinations of mesh, remat and micro-batch size instead of the configured one.
      estimate: from the sizes, without compiling.
      sizes: a key of `LLAMA_SIZES`, instead of the model at model.path.
      examples: per epoch, for data that are not on this machine.
      note: receives remarks.

    Raises:
      UserError: the target is unknown, or the config does not suit it.
    """
    require_config(config)
    machine, devices = _machine(target, estimate, note)
    if config.model.dtype == AUTO:
        config = _with_chosen_dtype(config, machine, note)
    architecture = LLAMA_SIZES[sizes] if sizes else _architecture(config, note)
    architecture = with_rope_scaling(architecture, config.model, config.data.max_length)
    tokens, named = NO_TOKENS, config.data.new_tokens or (config.lora is not None and config.lora.train_tokens)
    if named and sizes is None and _is_here(config.model.tokenizer_path):
        architecture = with_new_tokens(architecture, config.model, config.data)
        tokens = trained_tokens(config, architecture)
    spec = ModelSpec.of_run(architecture, config.model, config.lora, tokens)
    workload = Workload.of_run(spec, config, _statistics(config, examples, note))
    if search_layouts:
        plans = search(choices(workload, machine), machine, devices, notify=note)
    else:
        plans = [_plan_as_configured(config, workload, machine, devices)]
        for warning in idle_devices(plans[0].layout.mesh.devices, machine.devices):
            note(f"note: {warning}")
    return Planned(plans, None if plans[0].fits else nearest_fit(plans[0], devices), machine)


def _with_chosen_dtype(config: RunConfig, machine: Machine, note: Note) -> RunConfig:
    if machine.target.platform != "cpu":
        return with_dtype(config, "bfloat16")
    chosen = choose_dtype(jax.devices())  # no target is a CPU, so this machine is meant
    note(f"note: dtype {chosen}")
    return with_dtype(config, chosen.name)


def _print(planned: Planned, arguments: argparse.Namespace) -> None:
    # Piped output has no width; tables need this many columns.
    console = Console(width=None if sys.stdout.isatty() else 120)
    if arguments.search:
        console.print(ranking_table(planned.plans, arguments.price))
    console.print(plan_table(planned.plans[0], arguments.price))
    if not planned.plans[0].fits:
        console.print(_advice(planned.nearest_fit, planned.machine), style="bold", markup=False)


def _plan_as_configured(
    config: RunConfig, workload: Workload, machine: Machine, devices: Sequence[jax.Device] | None
) -> Plan:
    training = config.training
    layout = default_layout(config.mesh, training.remat, training.micro_batch_size, machine)
    if layout.mesh.devices > machine.devices:
        raise UserError(f"mesh: {layout.mesh.devices} devices, but the target has {machine.devices}; set mesh: auto")
    if layout.mesh.devices < machine.devices and (machine.hosts > 1 or machine.target.platform == "tpu"):
        raise UserError(
            f"mesh: {layout.mesh.devices} of the {machine.devices} devices of {machine.description}; on several hosts "
            "or a TPU slice, a run must use all devices: set --mesh=auto"
        )
    sizes = workload.spec.config
    check_tensor_parallelism(layout.mesh.tensor, sizes.num_heads, sizes.num_kv_heads, sizes.intermediate_size)
    check_batch_arithmetic(training, layout.shards)
    if devices is None:
        return estimated_plan(workload, layout, machine)
    return compiled_plan(workload, layout, machine, devices)


def _machine(target: str | None, estimate: bool, note: Note) -> tuple[Machine, Sequence[jax.Device] | None]:
    """The machine, and its devices to compile for; None if there is no compiler for them."""
    if target is None:
        return present_machine(jax.devices()), None if estimate else jax.devices()
    # Planning runs nothing on an accelerator, and a plugin that finds no device would end the program.
    jax.config.update("jax_platforms", "cpu")
    machine = parse_target(target)
    if estimate:
        return machine, None
    try:
        return machine, absent_devices(machine)
    except CompilerUnusable as error:
        note(f"note: {error}; the following is estimated from the sizes")
        return machine, None


def _architecture(config: RunConfig, note: Note) -> LlamaConfig:
    model = config.model
    if model.architecture is not None:
        return architecture_sizes(model.architecture, model.tokenizer_path)
    path = Path(str(model.path))
    missing = f"{path} does not exist here"
    try:
        directory = local_checkpoint(path, weights=False)
    except UserError as error:  # for example without a connection to the Hub
        directory, missing = path, str(error)
    if directory.is_dir():
        return read_architecture(directory)
    named = re.search(r"(?<!\d)(7|13|30|65)b", path.name.lower())
    if named is None:
        raise UserError(f"model.path: {missing}; give --sizes, one of {', '.join(LLAMA_SIZES)}")
    note(f"note: {missing}; using the sizes of LLaMA-{named[1]}B, because of its name")
    return LLAMA_SIZES[named[0]]


def _statistics(config: RunConfig, examples: int | None, note: Note) -> Statistics:
    """Computed from the data if they and the tokenizer are on this machine, otherwise assumed."""
    missing = [source.path for source in config.data.sources if not Path(source.path).exists()]
    if not missing and not _is_here(config.model.tokenizer_path):
        missing.append(config.model.tokenizer_path)
    if missing:
        note(f"note: not found: {', '.join(missing)}; the statistics of the data are assumed")
        return assumed_statistics(config.data, config.training, examples)
    tokenizer = load_tokenizer(config.model.tokenizer_path, config.data.new_tokens)
    template = open_template(config.data, config.model.tokenizer_path, tokenizer)
    store, _ = cached_corpus(config, tokenizer, template, default_directory(), note)
    store, _ = hold_out(store, config.evaluation)
    return measured_statistics(plan_steps(store, config.data, config.training, seed=config.seed, shards=None), store)


def _is_here(tokenizer: str) -> bool:
    """Whether a tokenizer is on this machine, or can be downloaded."""
    try:
        return local_checkpoint(tokenizer, weights=False).is_dir()
    except UserError:
        return False


def _advice(advice: Plan | None, machine: Machine) -> str:
    if advice is None:
        return f"no layout of this model fits {machine.description}: use more or larger devices"
    how = "compiled" if advice.compiled else "estimated"
    return (
        f"nearest layout that fits ({how}): {advice.name}: {advice.peak / 1e9:.1f} GB per device, "
        f"{advice.time.step:.2f} s per step"
    )
