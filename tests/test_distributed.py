"""The rank and number of processes, from the environment that launchers set."""

from pathlib import Path

import pytest

from flacuna_jax import distributed
from flacuna_jax.config.run import DistributedConfig
from flacuna_jax.distributed import local_devices, membership
from flacuna_jax.errors import UserError
from flacuna_jax.run.code_version import package_fingerprint

SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[03-06]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
}
OPEN_MPI_5 = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
}
OPEN_MPI_4 = {**OPEN_MPI_5, "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}
JOB_SET = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}


@pytest.mark.parametrize(
    ("environment", "together"),
    [
        ({}, False),
        (SLURM, True),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, False),
        (OPEN_MPI_4, True),
        ({**OPEN_MPI_4, "OMPI_COMM_WORLD_SIZE": "1"}, False),
        (JOB_SET, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "t-0,t-1,t-2,t-3"}, True),
        ({"TPU_WORKER_HOSTNAMES": "t-0", "MEGASCALE_NUM_SLICES": "2"}, True),
        ({**JOB_SET, "TPU_WORKER_HOSTNAMES": "t-0"}, False),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, True),
    ],
)
def test_a_launcher_with_several_processes_is_detected(environment, together):
    assert distributed._in_cluster({"TPU_SKIP_MDS_QUERY": "1", **environment}) == together


@pytest.mark.parametrize("installed", [True, False])
def test_a_tpu_vm_asks_its_metadata_server(installed, monkeypatch):
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: installed or None)
    assert distributed._in_cluster({}) == installed
    assert not distributed._in_cluster({"TPU_SKIP_MDS_QUERY": "1"})


@pytest.mark.parametrize("environment", [SLURM, OPEN_MPI_4, {"TPU_WORKER_HOSTNAMES": "t-0,t-1"}])
def test_jax_detects_what_it_can(environment):
    assert membership(DistributedConfig(), environment) == (None, None, None)


@pytest.mark.parametrize(
    ("settings", "environment", "expected"),
    [
        ({}, {**OPEN_MPI_5, "JAX_COORDINATOR_ADDRESS": "a:9"}, ("a:9", 2, 1)),
        ({"coordinator": "a:9"}, OPEN_MPI_5, ("a:9", 2, 1)),
        ({"coordinator": "a:9"}, SLURM, ("a:9", 4, 2)),
        ({"coordinator": "a:9", "num_processes": 8}, JOB_SET, ("a:9", 8, 3)),
        ({"coordinator": "a:9", "num_processes": 8, "process_id": 0}, SLURM, ("a:9", 8, 0)),
    ],
)
def test_a_coordinator_is_enough_if_the_launcher_gives_the_rest(settings, environment, expected):
    assert membership(DistributedConfig(**settings), environment) == expected


@pytest.mark.parametrize(
    ("settings", "environment", "missing"),
    [
        ({}, OPEN_MPI_5, "set distributed.coordinator"),
        ({"coordinator": "a:9"}, {}, "distributed.num_processes and distributed.process_id"),
        ({"num_processes": 2, "process_id": 0}, {}, "distributed.coordinator"),
        ({"coordinator": "a:9"}, JOB_SET, "set distributed.num_processes"),
    ],
)
def test_missing_settings_are_named(settings, environment, missing):
    with pytest.raises(UserError, match=missing):
        membership(DistributedConfig(**settings), environment)


def test_a_pod_of_an_indexed_job_does_not_train_alone(monkeypatch):
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--distributed.num_processes=1"):
        distributed.initialize(DistributedConfig(), JOB_SET)
    distributed.initialize(DistributedConfig(num_processes=1), JOB_SET)  # alone: nothing to join


@pytest.fixture
def eight_gpus(tmp_path: Path) -> Path:
    for name in (*(f"nvidia{i}" for i in range(8)), "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    ("environment", "own"),
    [
        ({}, None),
        (SLURM, list(range(8))),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1(x2),4(x2)", "SLURM_LOCALID": "3"}, [6, 7]),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_NODEID": "0", "SLURM_LOCALID": "5"}, [5]),
        ({**OPEN_MPI_4, "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, [4, 5, 6, 7]),
        # The launcher assigned each task its own GPUs.
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0", "CUDA_VISIBLE_DEVICES": "3"}, [0]),
        (
            {
                **SLURM,
                "SLURM_STEP_TASKS_PER_NODE": "2",
                "SLURM_NODEID": "0",
                "SLURM_GPUS_PER_TASK": "4",
                "CUDA_VISIBLE_DEVICES": "4,5,6,7",
            },
            [0, 1, 2, 3],
        ),
        ({**SLURM, "CUDA_VISIBLE_DEVICES": "1,2"}, [0, 1]),
        ({**SLURM, "CUDA_VISIBLE_DEVICES": ""}, None),
        ({**SLURM, "JAX_LOCAL_DEVICE_IDS": "2"}, None),
    ],
)
def test_each_process_gets_its_share_of_the_gpus(environment, own, eight_gpus):
    assert local_devices(environment, eight_gpus) == own


def test_without_gpus_there_are_no_device_ids(tmp_path):
    assert local_devices(SLURM, tmp_path) is None


def test_gpus_that_cannot_be_shared_evenly_are_an_error(eight_gpus):
    uneven = {**OPEN_MPI_4, "OMPI_COMM_WORLD_LOCAL_SIZE": "3"}
    with pytest.raises(UserError, match="3 processes on this host cannot share its 8 GPUs"):
        local_devices(uneven, eight_gpus)


def test_the_code_has_a_fingerprint():
    assert len(package_fingerprint()) == 64
