"""Several hosts as one JAX program: joins them, and verifies that all of them run the same thing.

JAX's multi-controller runtime does the work. Under Slurm, Open MPI 4, on TPU pods, and in Kubernetes with the
`kubernetes` package, it detects coordinator and ranks. Elsewhere `distributed.coordinator` names process 0; the number
of processes and the rank come from `distributed.num_processes` and `process_id` or from the launcher's variables.
"""

import hashlib
import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from flacuna_jax.config.run import DistributedConfig
from flacuna_jax.errors import UserError

Environment = Mapping[str, str]


@dataclass(frozen=True)
class Launcher:
    """Variables that a launcher sets for every process it starts."""

    name: str
    count: str
    rank: str
    local_rank: str = ""


LAUNCHERS = (
    Launcher("Slurm", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    Launcher("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    Launcher("Kubernetes", "", "JOB_COMPLETION_INDEX"),
)


def initialize(config: DistributedConfig, environment: Environment = os.environ) -> None:
    """Joins the cluster this process was started in, if there is one; call before anything touches a device.

    Raises:
      UserError: the settings are incomplete, or the coordinator does not answer in time.
    """
    if jax.distributed.is_initialized() or config.num_processes == 1:
        return
    if not (config.is_explicit or _in_cluster(environment)):
        return
    coordinator, processes, rank = membership(config, environment)
    # JAX's preemption service would handle SIGTERM; instead `run.stop` does, on every host at the same step.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            rank,
            local_devices(environment),
            initialization_timeout=config.join_seconds,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
            shutdown_timeout_seconds=config.heartbeat_seconds,
        )
    except (RuntimeError, ValueError, OSError) as error:
        first_line = str(error).splitlines()[0]
        where = coordinator or "the cluster's coordinator"
        raise UserError(f"distributed: joining {where} failed: {first_line}") from None


def unread_launcher(environment: Environment = os.environ) -> str | None:
    """A note about the variables of torchrun and accelerate, which we do not use; None if they are not set."""
    count = environment.get("WORLD_SIZE", "")
    if not count.isdecimal() or int(count) < 2 or jax.distributed.is_initialized():
        return None
    return (
        f"WORLD_SIZE={count} and RANK={environment.get('RANK', '')} are set, as by torchrun or accelerate, but are not "
        "used: start one process per host, which uses all devices; several hosts need distributed.coordinator, "
        "num_processes and process_id"
    )


def _in_cluster(environment: Environment) -> bool:
    """Whether a launcher started several processes. (Launchers set their variables for a single process too.)"""
    if "JAX_COORDINATOR_ADDRESS" in environment:
        return True
    if "TPU_WORKER_HOSTNAMES" in environment:
        return _many_tpu_hosts(environment)
    return _on_a_tpu_vm(environment) or any(
        int(environment.get(launcher.count) or 1) > 1 if launcher.count else launcher.rank in environment
        for launcher in LAUNCHERS
    )


def _many_tpu_hosts(environment: Environment) -> bool:
    hosts, slices = environment.get("TPU_WORKER_HOSTNAMES", ""), environment.get("MEGASCALE_NUM_SLICES", "1")
    return "," in hosts or int(slices) > 1


def _on_a_tpu_vm(environment: Environment) -> bool:
    """Whether this host has TPUs and JAX may ask its metadata server for the other hosts; there may be none.

    On import JAX looks for chips, and sets the variable if there are none.
    """
    return importlib.util.find_spec("libtpu") is not None and "TPU_SKIP_MDS_QUERY" not in environment


def membership(config: DistributedConfig, environment: Environment) -> tuple[str | None, int | None, int | None]:
    """(coordinator, number of processes, rank of this one); all None if JAX detects them itself.

    Raises UserError if neither config nor launcher gives the coordinator, the number or the rank.
    """
    coordinator = config.coordinator or environment.get("JAX_COORDINATOR_ADDRESS")
    if coordinator is None and not config.is_explicit and not _needs_a_coordinator(environment):
        return None, None, None
    processes, rank = config.num_processes, config.process_id
    for launcher in LAUNCHERS:
        if launcher.rank in environment:
            rank = int(environment[launcher.rank]) if rank is None else rank
            said = environment.get(launcher.count)
            processes = int(said) if processes is None and said else processes
    settings = {"coordinator": coordinator, "num_processes": processes, "process_id": rank}
    missing = [f"distributed.{name}" for name, value in settings.items() if value is None]
    if missing:
        raise UserError(
            f"distributed: set {' and '.join(missing)}, which this launcher does not provide (see scripts/); to train "
            "with a single process, set --distributed.num_processes=1"
        )
    return coordinator, processes, rank


def _needs_a_coordinator(environment: Environment) -> bool:
    """Whether JAX cannot detect the coordinator: under Open MPI 5, and in Kubernetes without its Python package."""
    if _many_tpu_hosts(environment):
        return False
    if "OMPI_COMM_WORLD_RANK" in environment and "SLURM_PROCID" not in environment:
        return "OMPI_MCA_orte_hnp_uri" not in environment
    return "JOB_COMPLETION_INDEX" in environment and importlib.util.find_spec("kubernetes") is None


def local_devices(environment: Environment, device_files: Path = Path("/dev")) -> list[int] | None:
    """Indices of the visible GPUs that this process uses; None if it uses all of them or there are none.

    A single process per host uses all; several share them evenly, unless the launcher already assigned each its own.
    (By default, JAX uses one GPU per process under Slurm and Open MPI.) `JAX_LOCAL_DEVICE_IDS` takes precedence.

    Raises UserError if the processes of a host cannot share its GPUs evenly.
    """
    if "JAX_LOCAL_DEVICE_IDS" in environment:
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        gpus = sum(1 for file in device_files.glob("nvidia*") if re.fullmatch(r"nvidia\d+", file.name))
    else:
        gpus = len([name for name in visible.split(",") if name.strip()])
    launcher = next((one for one in LAUNCHERS if one.local_rank and one.local_rank in environment), None)
    if not gpus or launcher is None:
        return None
    processes, rank = _on_this_host(environment), int(environment[launcher.local_rank])
    own = bool(environment.keys() & {"SLURM_GPUS_PER_TASK", "SLURM_TRES_PER_TASK"}) or gpus < processes
    if own or processes == 1:
        return list(range(gpus))
    if gpus % processes:
        raise UserError(
            f"distributed: {processes} processes on this host cannot share its {gpus} GPUs evenly; start one per host"
        )
    share = gpus // processes
    return list(range(rank * share, (rank + 1) * share))


def _on_this_host(environment: Environment) -> int:
    """Number of processes that the launcher started on this host. Slurm writes 2(x3),1 for three nodes with two
    processes and one node with one."""
    if "SLURM_STEP_TASKS_PER_NODE" not in environment:
        return int(environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", 1))
    per_node: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment["SLURM_STEP_TASKS_PER_NODE"]):
        per_node += [int(count)] * int(times or 1)
    return per_node[int(environment.get("SLURM_NODEID", 0))]


def of_first_host(number: int) -> int:
    """Host 0's number. Every host calls it, and gives its own."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def require_agreement(facts: Mapping[str, str]) -> None:
    """Raises `UserError` on every host if any fact (config, code version, data fingerprint) differs between hosts."""
    if jax.process_count() == 1:
        return
    digests = np.stack([np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8) for text in facts.values()])
    of_hosts = np.asarray(multihost_utils.process_allgather(digests))
    for index, name in enumerate(facts):
        others = [host for host in range(len(of_hosts)) if (of_hosts[host, index] != of_hosts[0, index]).any()]
        if others:
            raise UserError(f"distributed: {name} on host {', '.join(map(str, others))} differs from host 0's")
