"""Failed prints are dropped and do not change how the process ends."""

import subprocess
import sys

import pytest

PRINTS = """
import sys
from flacuna_jax.logs.steady_output import steady_output
with steady_output():
    for number in range(3000):
        print("step", number, flush=number % 2)
        print("warning", number, file=sys.stderr)
print("after")
sys.exit(75)
"""


@pytest.mark.parametrize("redirection", ["| true", ">/dev/full", ">&-", "2>&1 | true", ">/dev/full 2>&1", ">&- 2>&-"])
def test_closed_or_full_outputs_do_not_change_the_exit_status(tmp_path, redirection):
    script = tmp_path / "prints.py"
    script.write_text(PRINTS)
    command = f"{sys.executable} {script} {redirection}; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.returncode == 75, result.stderr[-500:]
    assert "Traceback" not in result.stderr


def test_all_output_is_written_if_possible(tmp_path):
    script = tmp_path / "prints.py"
    script.write_text(PRINTS)
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.stdout.splitlines()[:-1] == [f"step {number}" for number in range(3000)]
    assert result.stdout.splitlines()[-1] == "after"
    assert result.stderr.splitlines() == [f"warning {number}" for number in range(3000)]
