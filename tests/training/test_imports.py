"""Which libraries the training packages need at import."""

import subprocess
import sys

import pytest

BLOCKED_IMPORT = """
import importlib, sys
for name in sys.argv[2].split(","):
    sys.modules[name] = None
for module in sys.argv[1].split(","):
    importlib.import_module(f"flacuna_jax.{module}")
"""


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("training.step,training.optimizer", "orbax,orbax.checkpoint,grain,datasets"),
        (
            "logs.metrics,logs.progress,logs.report,run.resume,storage.checkpoint,storage.run_directory,training.step",
            "grain,datasets,wandb,matplotlib",
        ),
    ],
)
def test_imports_without(modules, absent):
    command = [sys.executable, "-c", BLOCKED_IMPORT, modules, absent]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
