"""Every target of the Makefile prints commands that a shell can read."""

import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parents[1] / "Makefile"
TARGETS = ("demo", "paper", "test", "test-all", "test-quick", "test-whole", "smollm2", "docs", "lint", "types")


@pytest.mark.skipif(not MAKEFILE.is_file(), reason="installed without the source tree")
@pytest.mark.parametrize("target", TARGETS)
def test_commands_are_shell(target, tmp_path):
    # Another virtual environment, so that its installation is among the commands.
    variables = [f"VENV={tmp_path}/newest", f"PARITY_VENV={tmp_path}/parity", f"WHOLE_VENV={tmp_path}/whole"]
    printed = subprocess.run(
        ["make", "--dry-run", target, *variables, f"FLACUNA_TEST_DATA={tmp_path}"],
        cwd=MAKEFILE.parent, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert printed.returncode == 0, printed.stderr
    commands = "\n".join(line for line in printed.stdout.splitlines() if not line.startswith("make["))
    assert "pip install" in commands
    parsed = subprocess.run(["sh", "-n"], input=commands, capture_output=True, text=True)
    assert parsed.returncode == 0, f"{parsed.stderr}\n{commands}"
