"""Searches for the best layout: estimates all possible layouts, compiles a few, and ranks those that fit."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import jax

from flacuna_jax.config.run import MeshConfig, RunConfig
from flacuna_jax.data.store_cache import default_directory
from flacuna_jax.errors import UserError
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.model.quantized import Quantization
from flacuna_jax.model.sharding import split_everywhere
from flacuna_jax.planning.plans import Plan, compiled_plan, estimated_plan
from flacuna_jax.planning.targets import Machine, present_machine
from flacuna_jax.planning.workload import Layout, Workload, assumed_statistics
from flacuna_jax.version import __version__
from flacuna_jax.whole_files import write_atomically

_logger = logging.getLogger(__name__)

REMATS = ("none", "dots", "full")
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
QUANTIZATIONS: tuple[Quantization, ...] = ("int8", "nf4")
Choice = tuple[Workload, Layout]
SHORTLIST = 8
TRAINER_SHORTLIST = 4
# A plan whose estimate exceeds the memory by this factor may still fit when it is compiled.
DOUBT = 1.15


def candidates(
    workload: Workload,
    machine: Machine,
    meshes: Sequence[MeshConfig] | None = None,
    remats: Sequence[str] = REMATS,
    micro_batches: Sequence[int] = MICRO_BATCHES,
) -> Iterator[Layout]:
    """Every layout on all devices of the machine that is valid for the network and the batch."""
    for mesh, remat, micro_batch in product(meshes or _meshes(workload.spec, machine), remats, micro_batches):
        layout = Layout(mesh, remat, micro_batch)
        rows = micro_batch * layout.shards
        by_rows = workload.training.batch_unit == "rows"
        exact = not by_rows or workload.training.batch_size % rows == 0
        # Larger micro-batches than a step has rows would be padding.
        if exact and (rows <= workload.statistics.rows_per_step or micro_batch == min(micro_batches)):
            yield layout


def _meshes(spec: ModelSpec, machine: Machine) -> list[MeshConfig]:
    """Meshes of that many devices, one replica per host unless fsdp needs more devices than a host has.

    Tensor stays within a host and divides heads and feed-forward.
    """
    config, devices, found = spec.config, machine.devices, []
    for tensor in (1, 2, 4, 8):
        divides = not any(n % tensor for n in (config.num_heads, config.num_kv_heads, config.intermediate_size))
        if devices % tensor or machine.devices_per_host % tensor or not divides:
            continue
        rest = devices // tensor
        for fsdp in (size for size in range(1, rest + 1) if rest % size == 0):
            replica = machine.hosts if machine.devices_per_host % (fsdp * tensor) == 0 else 1
            found.append(MeshConfig(replica=replica, data=rest // fsdp // replica, fsdp=fsdp, tensor=tensor))
    return found


def choices(workload: Workload, machine: Machine, micro_batches: Sequence[int] = MICRO_BATCHES) -> Iterator[Choice]:
    """Every layout; with adapters, also with a quantised base, unless it is already quantised."""
    forms = [workload]
    if workload.spec.lora is not None and workload.spec.quantization is None:
        forms += [workload.with_spec(replace(workload.spec, quantization=bits)) for bits in QUANTIZATIONS]
    for form in forms:
        for layout in candidates(form, machine, micro_batches=micro_batches):
            yield form, layout


def shortlist(among: Iterable[Choice], machine: Machine, length: int) -> list[Plan]:
    """The fastest plans by estimate among those that fit or almost fit; if there are none, the smallest."""
    plans = [estimated_plan(workload, layout, machine) for workload, layout in among]
    hopeful = [plan for plan in plans if plan.peak <= DOUBT * machine.usable_memory]
    if hopeful:
        return sorted(hopeful, key=_rank)[:length]
    return sorted(plans, key=lambda plan: plan.peak)[:1]


def _rank(plan: Plan) -> tuple[bool, float, bool, int]:
    """Sort key: plans that fit first, then by time, then plans without a quantised base, then by memory."""
    return not plan.fits, float(f"{plan.time.step:.2e}"), plan.workload.spec.quantization is not None, plan.peak


def search(
    among: Iterable[Choice],
    machine: Machine,
    devices: Sequence[jax.Device] | None,
    length: int = SHORTLIST,
    notify: Callable[[str], None] = lambda _: None,
) -> list[Plan]:
    """Plans ranked by time, those that fit first; compiled if there is a compiler (`devices` is not None)."""
    plans = shortlist(among, machine, length)
    if devices is not None:
        compiled = []
        for number, plan in enumerate(plans, 1):
            notify(f"compiling {number} of {len(plans)}: {plan.name}")
            compiled.append(compiled_plan(plan.workload, plan.layout, machine, devices))
            if refused := compiled[-1].refused:
                notify(f"the compiler failed for {plan.name}, which is estimated instead: {refused}")
        plans = compiled
    return sorted(plans, key=_rank)


def nearest_fit(plan: Plan, devices: Sequence[jax.Device] | None) -> Plan | None:
    """The fastest plan that fits with the fewest changes; None if the machine is too small."""
    workload, machine, given = plan.workload, plan.machine, plan.layout
    # Estimates are scaled by the error of the estimate for the given plan.
    correction = plan.peak / estimated_plan(workload, given, machine).peak

    def changes(other: Plan) -> int:
        # A quantised base is the largest change, because it changes the result; then another mesh, with other links.
        layout, quantised = other.layout, other.workload.spec.quantization != workload.spec.quantization
        small = (layout.remat != given.remat) + (layout.micro_batch != given.micro_batch)
        return 8 * quantised + 2 * (layout.mesh != given.mesh) + small

    smaller = [size for size in MICRO_BATCHES if size <= given.micro_batch]
    plans = [
        estimated_plan(form, layout, machine)
        for form, layout in choices(workload, machine, smaller)
        if (form, layout) != (workload, given)
    ]
    fitting = [other for other in plans if other.peak * correction <= machine.usable_memory]
    for other in sorted(fitting, key=lambda other: (changes(other), other.time.step))[:3]:
        if devices is None:
            return other
        compiled = compiled_plan(other.workload, other.layout, machine, devices)
        if compiled.fits:
            return compiled
    return None


def choose_layout(config: RunConfig, spec: ModelSpec, devices: Sequence[jax.Device]) -> tuple[MeshConfig, str]:
    """What `mesh: auto` and `remat: auto` of a config mean on the devices that are here.

    Other settings are kept. At most four candidates, the fastest by estimate, are compiled; the result is cached for
    the same network, settings, devices and versions (`data.store_cache.default_directory`). On CPUs nothing is
    compiled: weights are split over all devices, and the results of products and attention are saved. If the compiler
    fails for the candidates for a reason other than memory, the estimate decides, with a warning, and the result is not
    cached.

    Returns the mesh and the remat policy, to be written to the resolved config.

    Raises:
      UserError: no layout that the config permits fits; the message names the nearest one.
    """
    auto_mesh, auto_remat = not isinstance(config.mesh, MeshConfig), config.training.remat == "auto"
    mesh = config.mesh if isinstance(config.mesh, MeshConfig) else split_everywhere(devices)
    remat = "dots" if auto_remat else config.training.remat
    if not (auto_mesh or auto_remat) or devices[0].platform == "cpu":
        return mesh, remat
    machine = present_machine(devices[: mesh.devices])
    workload = Workload.of_run(spec, config, assumed_statistics(config.data, config.training))
    cache = _cache_file(workload, machine, config)
    if cache.is_file():
        answer = json.loads(cache.read_text())
        return MeshConfig(**answer["mesh"]), answer["remat"]
    layouts = candidates(
        workload,
        machine,
        None if auto_mesh else [mesh],
        REMATS if auto_remat else [remat],
        [config.training.micro_batch_size],
    )
    best = search(((workload, layout) for layout in layouts), machine, devices, TRAINER_SHORTLIST)[0]
    if not best.fits:
        raise UserError(
            f"mesh: auto finds no layout that fits {machine.description}: {best.layout} needs {best.peak / 1e9:.1f} GB "
            f"of {machine.usable_memory / 1e9:.1f} GB per device; lower training.micro_batch_size or data.max_length, "
            "or see `flacuna plan --search`"
        )
    if best.refused:
        _logger.warning("mesh and remat are chosen by the estimate, because the compiler failed (%s)", best.refused)
        return best.layout.mesh, best.layout.remat
    answer = {"mesh": best.layout.mesh.model_dump(), "remat": best.layout.remat}
    write_atomically(cache, json.dumps(answer))
    return best.layout.mesh, best.layout.remat


def _cache_file(workload: Workload, machine: Machine, config: RunConfig) -> Path:
    key = repr((workload, machine, config.mesh, jax.__version__, __version__))
    return default_directory() / "layouts" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
