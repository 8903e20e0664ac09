"""What the training room may lean on."""

import subprocess
import sys

import pytest

BLOCKED_IMPORT = """
import importlib, sys
for name in sys.argv[2].split(","):
    sys.modules[name] = None
for module in sys.argv[1].split(","):
    importlib.import_module(f"flacuna_jax.training.{module}")
"""


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        ("step,optimizer", "orbax,orbax.checkpoint,grain,datasets"),
        ("checkpoint,metrics,optimizer,progress,report,resume,run_directory,step", "grain,datasets,wandb,matplotlib"),
    ],
)
def test_imports_without(modules, absent):
    command = [sys.executable, "-c", BLOCKED_IMPORT, modules, absent]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
