"""Power cuts on a real file system: the checkpoint before the cut is intact."""

import ctypes
import fcntl
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.faults.runs import ROOT, mounted

pytestmark = pytest.mark.usefixtures("compiled_once", "signals_of_a_terminal")


SAVER = """
import sys
sys.path[:0] = [sys.argv[2], sys.argv[2] + "/tests/storage"]
from pathlib import Path
import test_checkpoint as t
with t.Checkpointer(Path(sys.argv[1]), keep=2, asynchronous=False) as checkpointer:
    restored = checkpointer.restore(*map(t.abstract, t.state_after(0)), check=lambda meta: None, notify=print)
    step = restored.step if restored else 0
    print(f"started {step}", flush=True)
    while True:
        step += 1
        checkpointer.save(step, *t.state_after(step), t.META)
        print(step, flush=True)
"""
EXT4_IOC_SHUTDOWN, WITHOUT_FLUSHING_THE_LOG = 0x8004587D, 2


def power_cut(directory: Path) -> None:
    """After this, nothing reaches the device any more, including the journal's tail; data in memory are lost."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, EXT4_IOC_SHUTDOWN, bytes(ctypes.c_uint32(WITHOUT_FLUSHING_THE_LOG)))
    finally:
        os.close(descriptor)


def cut_power_while_saving(tmp_path: Path, cuts: int, seed: int) -> None:
    """Cuts the power at random times; everything reported as saved before must exist."""
    image, random = tmp_path / "image", np.random.default_rng(seed)
    with image.open("wb") as file:
        file.truncate(48 << 20)
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("needs mkfs.ext4")
    subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
    reported = 0
    for _ in range(cuts):
        with mounted(tmp_path / "disk", "-o", "loop", str(image)) as disk:
            command = [sys.executable, "-c", SAVER, str(disk / "run"), str(ROOT)]
            errors = tmp_path / "errors"
            with errors.open("w") as file:
                saver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True)
            try:
                said = saver.stdout.readline()
                while "damaged and was skipped" in said:  # renamed, but not yet on the disk at the power cut
                    said = saver.stdout.readline()
                assert said.startswith("started "), f"{said}\n{errors.read_text()}"
                assert int(said.split()[1]) >= reported - 1, "reported checkpoints are intact"
                reported = int(saver.stdout.readline())  # on a slow machine, the time of one save is not known
                time.sleep(random.uniform(0.05, 1.5))
                power_cut(disk)
            finally:
                saver.kill()
                rest = saver.stdout.read().split("\n")[:-1]
                saver.wait()
                saver.stdout.close()
            # Reports after the cut do not count: the last fsync may have finished just before it.
            reported = max([reported, *(int(line) for line in rest if line.isdigit())])
    assert reported > 0


def test_a_power_cut_during_a_checkpoint_keeps_the_previous_one(tmp_path):
    cut_power_while_saving(tmp_path, cuts=2, seed=0)


@pytest.mark.slow
def test_many_power_cuts(tmp_path):
    cut_power_while_saving(tmp_path, cuts=15, seed=1)
