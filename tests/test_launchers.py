"""The launchers in scripts/, with replacements for the commands of the cluster."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from flacuna_jax.config.files import load_config
from flacuna_jax.config.run import MeshConfig

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"


class Cluster:
    """A directory of replacement commands, each of which records its arguments."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.notes = directory, directory / "calls"
        self.environment = {**os.environ, "PATH": f"{directory}:{os.environ['PATH']}", "NOTES": str(self.notes)}

    def command(self, name: str, body: str = "") -> None:
        path = self.directory / name
        path.write_text(f'#!/usr/bin/env bash\necho "$(basename "$0") $*" >> "$NOTES"\n{body}\n')
        path.chmod(0o755)

    def ends(self, name: str, *statuses: int) -> None:
        """A command that exits with the given statuses, one after the other."""
        ladder = "".join(f"{number}) exit {status};; " for number, status in enumerate(statuses, 1))
        self.command(name, f'case $(grep -c "^{name} " "$NOTES") in {ladder} esac')

    @property
    def calls(self) -> list[str]:
        return self.notes.read_text().splitlines() if self.notes.exists() else []

    def run(self, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [SCRIPTS / script, *arguments],
            env={**self.environment, "RESTART_PAUSE": "0", "PAUSE": "0", "POLL": "0", **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


@pytest.mark.parametrize(
    ("statuses", "restarts", "expected", "starts"),
    [((0,), 3, 0, 1), ((2,), 3, 2, 1), ((1, 137, 0), 3, 0, 3), ((1, 1, 2), 3, 2, 3), ((1, 1, 1, 7), 3, 7, 4)],
)
def test_restart_repeats_until_success_or_wrong_input(cluster, statuses, restarts, expected, starts):
    cluster.ends("train", *statuses)
    assert cluster.run("restart.sh", "train", "--a=b c", RESTARTS=str(restarts)).returncode == expected
    assert cluster.calls == ["train --a=b c"] * starts


def test_restart_forwards_signals_and_lets_the_command_save(cluster):
    cluster.command("train", "trap 'sleep 0.5; echo saved >> \"$NOTES\"; exit 75' TERM; while :; do sleep 0.05; done")
    process = subprocess.Popen([SCRIPTS / "restart.sh", "train"], env=cluster.environment)
    deadline = time.monotonic() + 20
    while not cluster.calls:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
    assert cluster.calls[-1] == "saved"


@pytest.mark.parametrize(
    ("status", "restarts", "expected", "requeued"),
    [(0, "0", 0, False), (2, "0", 2, False), (75, "0", 0, True), (137, "3", 0, True), (1, "50", 1, False)],
)
def test_slurm_requeues_the_job(cluster, status, restarts, expected, requeued):
    cluster.ends("srun", status)
    cluster.command("scontrol")
    result = cluster.run(
        "slurm.sh", "c.yaml", "--mesh={replica: 2, fsdp: 8}", SLURM_JOB_ID="42", SLURM_RESTART_COUNT=restarts
    )
    assert result.returncode == expected
    start = "srun --kill-on-bad-exit=1 python -m flacuna_jax.train --config c.yaml --mesh={replica: 2, fsdp: 8}"
    assert cluster.calls == [start] + ["scontrol requeue 42"] * requeued


def test_open_mpi_starts_one_process_per_host_with_the_first_as_coordinator(cluster):
    cluster.ends("mpirun", 1, 0)
    result = cluster.run("openmpi.sh", "c.yaml", "--seed=3", HOSTS="n1:1,n2,n3", MPIRUN_OPTIONS="-x A=1")
    assert result.returncode == 0, result.stderr
    start = "mpirun -np 3 --host n1:1,n2,n3 -x A=1 python -m flacuna_jax.train --config c.yaml --seed=3"
    assert cluster.calls == [f"{start} --distributed.coordinator=n1:8476"] * 2


@pytest.mark.parametrize(("script", "arguments"), [("slurm.sh", []), ("openmpi.sh", ["c.yaml"]), ("tpu_vm.sh", ["t"])])
def test_a_wrong_call_prints_the_usage(cluster, script, arguments):
    result = cluster.run(script, *arguments)
    assert (result.returncode, result.stderr.startswith("usage:")) == (2, True)


def test_a_preempted_tpu_is_requested_again(cluster):
    """No TPU; active; training fails because of a preemption; requested again; done."""
    cluster.command(
        "gcloud",
        """
        case "$*" in
        *describe*) cat state 2>/dev/null;;
        *create*) echo ACTIVE > state;;
        *delete*) rm state;;
        *train*) [[ -e taken ]] || { touch taken; echo SUSPENDED > state; exit 255; };;
        esac""",
    )
    arguments = ["my-tpu", "c.yaml", "--mesh={replica: 2, fsdp: 16}"]
    result = subprocess.run(
        [SCRIPTS / "tpu_vm.sh", *arguments],
        env={**cluster.environment, "TYPE": "v5litepod-16", "ZONE": "z", "SLICES": "2", "PAUSE": "0", "POLL": "0"},
        cwd=cluster.directory,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    calls = [call for call in cluster.calls if "describe" not in call]
    created = [call for call in calls if " create " in call]
    assert len(created) == 2
    assert all("--node-count=2 --node-prefix=my-tpu" in call for call in created)
    trained = [call for call in calls if "flacuna_jax.train" in call]
    assert {call.split()[5] for call in trained} == {"my-tpu-0", "my-tpu-1"}
    assert all(r"--config c.yaml --mesh=\{replica:\ 2\,\ fsdp:\ 16\}" in call for call in trained)


@pytest.mark.parametrize("name", ["jobset_gpu.yaml", "jobset_tpu.yaml"])
def test_job_sets_agree_with_themselves_and_the_config(name):
    document = yaml.safe_load((SCRIPTS / name).read_text())
    (group,) = document["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    config_file, *overrides = container["args"]
    config = load_config(ROOT / config_file.removeprefix("--config="), overrides)
    assert isinstance(config.mesh, MeshConfig)

    assert job["parallelism"] == job["completions"]
    pods = group.get("replicas", 1) * job["parallelism"]
    chips = next(iter(container["resources"]["limits"].values()))
    assert config.mesh.devices == pods * chips
    if "gpu" in name:
        jobset, subdomain = document["metadata"]["name"], document["metadata"]["name"]
        assert config.distributed.num_processes == pods
        assert config.distributed.coordinator.startswith(f"{jobset}-{group['name']}-0-0.{subdomain}:")
    # Wrong input ends the job; all other failures restart it.
    assert document["spec"]["failurePolicy"]["maxRestarts"] > 0
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    assert pod["terminationGracePeriodSeconds"] >= 60


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_the_scripts_are_clean():
    subprocess.run(["shellcheck", *SCRIPTS.glob("*.sh")], check=True)
