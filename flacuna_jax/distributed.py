"""Several hosts as one JAX program: who they are, and proof that they are about to run the same thing.

JAX's own multi-controller runtime does the work. Under Slurm, Open MPI, Kubernetes and TPU pods it finds coordinator
and ranks by itself; elsewhere `distributed.coordinator`, `num_processes` and `process_id` say them.
"""

import hashlib
import os
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from flacuna_jax.config import DistributedConfig
from flacuna_jax.errors import UserError

# Each launcher sets these for every process it starts; more than one process is a cluster.
_PROCESS_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
_CLUSTER_MARKS = ("JOB_COMPLETION_INDEX", "JAX_COORDINATOR_ADDRESS")


def initialize(config: DistributedConfig, environment: Mapping[str, str] = os.environ) -> None:
    """Joins the cluster this process was started in, if there is one; call before anything touches a device.

    Raises:
      UserError: the settings are incomplete, or the coordinator does not answer in time.
    """
    if jax.distributed.is_initialized() or not (config.is_explicit or _in_cluster(environment)):
        return
    if config.is_explicit and None in (config.coordinator, config.num_processes, config.process_id):
        raise UserError("distributed: coordinator, num_processes and process_id go together; one is missing")
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            initialization_timeout=config.join_seconds,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
            shutdown_timeout_seconds=config.heartbeat_seconds,
        )
    except (RuntimeError, ValueError) as error:
        first_line = str(error).splitlines()[0]
        where = config.coordinator or "the cluster's coordinator"
        raise UserError(f"distributed: joining {where} failed: {first_line}") from None


def _in_cluster(environment: Mapping[str, str]) -> bool:
    if any(int(environment.get(name) or 1) > 1 for name in _PROCESS_COUNTS):
        return True
    several_workers = "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    return several_workers or any(name in environment for name in _CLUSTER_MARKS)


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
