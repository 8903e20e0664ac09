"""SIGKILL at random times, and during saves.

In every case the next start continues to the bytes of an undisturbed run, or reports why it cannot.
"""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.faults.runs import EVALUATED, assert_same_run, start, steps_logged, wait_for
from tests.small_run import SIZES, write_run
from tests.test_end_to_end import losses

pytestmark = pytest.mark.usefixtures("compiled_once", "signals_of_a_terminal")


def grows(directory: Path, by: int = 1):
    """Whether the log has grown since it was shortest, because a resumed run cuts it back to its checkpoint."""
    shortest = [steps_logged(directory)]

    def has_grown() -> bool:
        now = steps_logged(directory)
        shortest[0] = min(shortest[0], now)
        return now >= shortest[0] + by

    return has_grown


@dataclasses.dataclass(frozen=True)
class Killed:
    """Counts of `kill_again_and_again`."""

    continued: int
    """Starts that found a checkpoint."""
    died_at: list[int]


def kill_again_and_again(
    tmp_path: Path, config: Path, settings: list[str], kills: int, until: Callable[[Path, subprocess.Popen], None]
) -> Killed:
    """Sends SIGKILL each time `until` returns; raises unless the run then ends with the bytes of an undisturbed run."""
    compiled = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"), "FLACUNA_CACHE": str(tmp_path / "tokens")}
    whole = start(config, f"--output_dir={tmp_path / 'whole'}", *settings, **compiled)
    assert whole.wait(600) == 0, whole.stdout.read()
    whole.stdout.close()
    out, died_at, continued = tmp_path / "run", [], 0
    while len(died_at) < kills:
        process, said = start(config, f"--output_dir={out}", *settings, **compiled), ""
        try:
            try:
                until(out, process)
            except AssertionError as ended_by_itself:
                said = str(ended_by_itself)
            process.send_signal(signal.SIGKILL)
            status = process.wait()
            said += process.stdout.read()
        finally:
            process.kill()
            process.stdout.close()
        if status == 0:
            # The run has finished: compare its result, and use another run for the other kills.
            assert_same_run(out, tmp_path / "whole")
            shutil.rmtree(out)
            continue
        assert status == -signal.SIGKILL, said
        assert "Traceback" not in said
        assert "damaged" not in said, "a kill leaves only complete checkpoints"
        continued += "resuming after step" in said
        died_at.append(max(losses(out), default=0) if steps_logged(out) else 0)
    last = start(config, f"--output_dir={out}", *settings, **compiled)
    assert last.wait(600) == 0, last.stdout.read()
    last.stdout.close()
    assert_same_run(out, tmp_path / "whole")
    samples = [(directory / "samples.jsonl").read_text() for directory in (out, tmp_path / "whole")]
    assert samples[0] == samples[1]
    killed = Killed(continued, died_at)
    print(json.dumps({"kills": kills, **dataclasses.asdict(killed)}))
    return killed


@pytest.mark.slow
def test_a_run_killed_fifty_times_at_random_ends_with_the_same_bytes(tmp_path):
    """Kills during start, compilation, steps, saves and evaluations. FLACUNA_KILLS sets another number."""
    random = np.random.default_rng(int(os.environ.get("FLACUNA_KILL_SEED", "0")))
    kills = int(os.environ.get("FLACUNA_KILLS", "50"))
    config = write_run(tmp_path / "input", training={"epochs": 60, "batch_size": 8}, checkpoint={"every_steps": 3})

    def until(out: Path, process: subprocess.Popen) -> None:
        # Some are killed during the start; most are some steps after their first write.
        if random.random() < 0.15:
            time.sleep(random.uniform(0, 6))
        else:
            wait_for(grows(out), process)
            time.sleep(random.exponential(1.0))

    killed = kill_again_and_again(tmp_path, config, [EVALUATED, "--checkpoint.keep=2"], kills, until)
    assert killed.continued > kills / 2


def saving(directory: Path) -> bool:
    """Whether a checkpoint is being written and is not complete yet."""
    return any((directory / "checkpoints").glob("*tmp*"))


@pytest.mark.slow
def test_a_run_killed_in_asynchronous_saves_ends_with_the_same_bytes(tmp_path):
    """Full fine-tuning saves asynchronously. Each kill is during a save, or directly after one; no incomplete
    checkpoint is used, and no complete one is lost."""
    random = np.random.default_rng(int(os.environ.get("FLACUNA_KILL_SEED", "0")))
    kills = int(os.environ.get("FLACUNA_KILLS", "24"))
    sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 256, "num_layers": 4}
    config = write_run(
        tmp_path / "input",
        lora=None,
        model={"architecture": sizes},
        training={"epochs": 60, "batch_size": 8, "learning_rate": 1e-4},
        checkpoint={"every_steps": 4, "keep": 2},
    )
    in_a_save = 0

    def until(out: Path, process: subprocess.Popen) -> None:
        nonlocal in_a_save
        wait_for(grows(out, by=int(random.integers(2, 16))), process)
        wait_for(lambda: saving(out), process)
        time.sleep(random.uniform(0, 0.1))
        in_a_save += saving(out)

    killed = kill_again_and_again(tmp_path, config, [EVALUATED], kills, until)
    print(f"{in_a_save} of {kills} kills fell into a save")
    assert in_a_save > kills / 4
    assert killed.continued > kills / 2
