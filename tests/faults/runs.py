"""Runs in this process and in others, what they deliver, and disks to disturb them with."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_end_to_end import losses

ROOT = Path(__file__).parents[2]
EVALUATED = "--evaluation={every_steps: 5, fraction: 0.2, samples: 1, sample_tokens: 4}"
LONG = ["--training.epochs=400", "--checkpoint.every_steps=1000", "--logging.every_steps=1"]


def start(config: Path, *overrides: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "flacuna_jax.train", "--config", str(config), *overrides],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def steps_logged(directory: Path) -> int:
    path = directory / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def assert_same_run(directory: Path, expected: Path) -> None:
    assert losses(directory) == losses(expected)
    assert losses(directory, "mean_loss") == losses(expected, "mean_loss")
    assert delivered(directory) == delivered(expected)


def delivered(directory: Path) -> dict[str, bytes]:
    """The weights in adapter/, or in model/ after full fine-tuning."""
    found = {str(path.relative_to(directory)): path.read_bytes() for path in directory.glob("*/*.safetensors")}
    assert found
    return found


@contextlib.contextmanager
def mounted(directory: Path, *options: str):
    """Mounts with the given options for `mount`; skips where this user may not."""
    directory.mkdir(exist_ok=True)
    result = subprocess.run(["mount", *options, str(directory)], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"mounting a file system needs root and, for images, loop devices: {result.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def fill(filler: Path) -> None:
    """Fills the remaining space of a disk."""
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
