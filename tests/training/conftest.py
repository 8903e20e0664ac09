"""A file system of one mebibyte, to run into its end for real."""

import subprocess

import pytest


@pytest.fixture
def small_disk(tmp_path):
    """A mounted directory with 1 MiB of space; skips where this user may not mount."""
    directory = tmp_path / "small"
    directory.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)], capture_output=True)
    if mount.returncode:
        pytest.skip("mounting a small file system needs root")
    yield directory
    subprocess.run(["umount", "--lazy", str(directory)], check=True)
