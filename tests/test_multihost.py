"""Several hosts as real processes on loopback, two devices each."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.small_run import write_run
from tests.test_end_to_end import adapter_bytes, losses, run

pytestmark = pytest.mark.usefixtures("compiled_once")

MAX_STEPS = 6


def start_hosts(
    config: Path,
    *overrides: str,
    hosts: int = 2,
    per_host: dict[int, list[str]] | None = None,
    caches: Sequence[Path] | None = None,
):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    common = [sys.executable, "-m", "flacuna_jax.train", "--config", str(config), *overrides]
    common += [f"--distributed.coordinator=127.0.0.1:{port}", f"--distributed.num_processes={hosts}"]
    return [
        subprocess.Popen(
            [*common, f"--distributed.process_id={host}", *(per_host or {}).get(host, [])],
            env=environment | ({"FLACUNA_CACHE": str(caches[host])} if caches else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for host in range(hosts)
    ]


def finish(processes: list[subprocess.Popen], seconds: int = 280) -> list[tuple[int, str]]:
    """The status and output of each; all are read concurrently, because one with a full pipe would block all."""
    try:
        with ThreadPoolExecutor(len(processes)) as readers:
            said = list(readers.map(lambda process: process.communicate(timeout=seconds)[0], processes))
        return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, compiled_once: None) -> Path:
    """The same run in one process with four devices."""
    directory = tmp_path_factory.mktemp("alone")
    checkpoint = {"every_steps": 2, "keep": 9}
    config = write_run(directory, training={"max_steps": MAX_STEPS}, mesh={"fsdp": 4}, checkpoint=checkpoint)
    assert run(config) == 0
    return directory


@pytest.fixture(scope="module")
def two_hosts(alone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the same run on two hosts with two devices each."""
    directory = tmp_path_factory.mktemp("two") / "run"
    results = finish(start_hosts(alone / "config.yaml", f"--output_dir={directory}"))
    assert [status for status, _ in results] == [0, 0], results
    return directory


def assert_same_run(expected: Path, actual: Path) -> None:
    """The same batches in the same order, and losses that differ only by rounding."""
    records = [[json.loads(line) for line in (path / "metrics.jsonl").open()] for path in (expected, actual)]
    for name in ("step", "epoch", "examples", "rows", "tokens", "supervised_tokens"):
        assert [record[name] for record in records[1]] == [record[name] for record in records[0]], name
    np.testing.assert_allclose(*([record["loss"] for record in run] for run in records[::-1]), atol=1e-5)


def test_two_hosts_train_the_same_as_one(alone, two_hosts):
    assert_same_run(alone / "run", two_hosts)
    assert (two_hosts / "adapter" / "adapter_model.safetensors").is_file()

    # One host resumes the run of two, which is already complete.
    before = adapter_bytes(two_hosts)
    assert run(alone / "config.yaml", f"--output_dir={two_hosts}") == 0
    assert adapter_bytes(two_hosts) == before


def back_at(step: int, run_directory: Path, copy: Path) -> str:
    """A copy of a run at the time when the checkpoint of `step` was its newest, and the option that resumes it."""
    shutil.copytree(run_directory, copy, ignore=shutil.ignore_patterns("adapter"))
    for checkpoint in (copy / "checkpoints").iterdir():
        if checkpoint.name.isdigit() and int(checkpoint.name) > step:
            shutil.rmtree(checkpoint)
    return f"--output_dir={copy}"


@pytest.mark.parametrize(
    "mesh", ["{fsdp: 1}", "{data: 2, tensor: 2}", "{replica: 2, fsdp: 2}"], ids=["1 device", "data × tensor", "replica"]
)
def test_one_process_resumes_a_run_of_two_on_any_mesh(alone, two_hosts, tmp_path, mesh):
    assert run(alone / "config.yaml", back_at(2, two_hosts, tmp_path / "run"), f"--mesh={mesh}") == 0
    assert_same_run(alone / "run", tmp_path / "run")


def test_two_processes_resume_a_run_of_one(alone, tmp_path):
    out = back_at(4, alone / "run", tmp_path / "run")
    results = finish(start_hosts(alone / "config.yaml", out, "--mesh={data: 2, fsdp: 2}"))
    assert [status for status, _ in results] == [0, 0], results
    assert "resuming after step 4" in results[0][1]
    assert_same_run(alone / "run", tmp_path / "run")


def test_hosts_with_different_settings_refuse_to_start(alone, tmp_path):
    results = finish(
        start_hosts(
            alone / "config.yaml",
            f"--output_dir={tmp_path / 'run'}",
            per_host={1: ["--training.learning_rate=0.5"]},
        )
    )
    assert [status for status, _ in results] == [2, 2], results
    assert all("the config on host 1 differs" in said for _, said in results)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_killed_host_stops_the_others_and_the_restart_continues(alone, tmp_path):
    out = f"--output_dir={tmp_path / 'run'}"
    processes = start_hosts(
        alone / "config.yaml",
        out,
        "--training.max_steps=60",
        "--training.epochs=20",
        "--distributed.heartbeat_seconds=10",
    )
    deadline = time.monotonic() + 200
    while not (tmp_path / "run" / "checkpoints" / "2").is_dir():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    status = processes[0].wait(60)
    assert status != 0
    assert time.monotonic() - killed < 60
    processes[1].wait()

    directory = tmp_path / "whole"
    assert (
        run(
            alone / "config.yaml",
            f"--output_dir={directory}",
            "--training.max_steps=60",
            "--training.epochs=20",
            "--checkpoint.every_steps=20",
        )
        == 0
    )
    results = finish(
        start_hosts(
            alone / "config.yaml", out, "--training.max_steps=60", "--training.epochs=20", "--checkpoint.every_steps=20"
        )
    )
    assert [status for status, _ in results] == [0, 0], results
    assert "resuming after step" in results[0][1]
    expected, actual = losses(directory), losses(tmp_path / "run")
    assert actual[60] == pytest.approx(expected[60], abs=1e-4)


def test_a_signal_to_one_host_stops_all_at_the_same_step(alone, tmp_path):
    """Schedulers signal the hosts at different times. All save once, and exit with the status for a signal."""
    out = f"--output_dir={tmp_path / 'run'}"
    never = ["--checkpoint.every_steps=100000", "--training.max_steps=5000", "--training.epochs=5000"]
    processes = start_hosts(alone / "config.yaml", out, *never)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (metrics.is_file() and metrics.stat().st_size):
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGTERM)
    results = finish(processes)
    assert [status for status, _ in results] == [75, 75], results
    (saved,) = (checkpoint.name for checkpoint in (tmp_path / "run" / "checkpoints").iterdir())
    assert all(f"saved after step {saved}" in said for _, said in results)


@pytest.mark.slow
def test_hosts_wait_for_a_late_host(alone, tmp_path):
    first = start_hosts(alone / "config.yaml", f"--output_dir={tmp_path / 'run'}", "--training.max_steps=1")
    first[1].send_signal(signal.SIGSTOP)
    time.sleep(15)
    first[1].send_signal(signal.SIGCONT)
    assert [status for status, _ in finish(first)] == [0, 0]
