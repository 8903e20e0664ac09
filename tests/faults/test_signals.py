"""Signals at every stage of a run.

In every case the next start continues to the bytes of an undisturbed run, or reports why it cannot.
"""

import contextlib
import os
import pty
import shlex
import signal
import subprocess
import sys
import time

import pytest

from flacuna_jax.cli import EXIT_STOPPED
from flacuna_jax.run import training_run
from flacuna_jax.run.stop import SIGNALS
from flacuna_jax.storage.checkpoint import list_checkpoints
from flacuna_jax.training.loop import StateHook
from tests.faults.runs import LONG, assert_same_run, start, steps_logged, wait_for
from tests.test_end_to_end import at_step, losses, run, terminate

pytestmark = pytest.mark.usefixtures("compiled_once", "signals_of_a_terminal")


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in SIGNALS if n != signal.SIGTERM)]
)
def test_a_signal_saves_the_step_and_exits_with_its_own_status(undisturbed, tmp_path, number):
    out = tmp_path / "run"
    process = start(undisturbed / "config.yaml", f"--output_dir={out}", *LONG)
    try:
        wait_for(lambda: steps_logged(out) > 5, process)
        process.send_signal(number)
        assert process.wait(60) == EXIT_STOPPED
        said = process.stdout.read()
    finally:
        process.kill()
        process.stdout.close()
    (saved,) = list_checkpoints(out)
    assert saved == max(losses(out)) > 5, "the current step, not one at an interval"
    assert f"stopped: {number.name}: saved after step {saved}" in said
    assert "Traceback" not in said
    assert not (out / "adapter").exists()
    assert f"stopped by {number.name} after step {saved}" in (out / "report.html").read_text()


def test_ctrl_c_in_a_pipeline_ends_the_reader_first_and_the_run_saves(undisturbed, tmp_path):
    """`train | tee log`: a terminal sends SIGINT to both, so the run saves after its output has lost its reader."""
    out = tmp_path / "run"
    words = [sys.executable, "-m", "flacuna_jax.train", "--config", undisturbed / "config.yaml", f"--output_dir={out}"]
    command = f"{shlex.join(map(str, [*words, *LONG]))} 2>&1 | cat; echo ${{PIPESTATUS[@]}} > {tmp_path / 'status'}"
    shell = subprocess.Popen(["bash", "-c", f"trap : INT; {command}"], start_new_session=True)
    try:
        wait_for(lambda: steps_logged(out) > 5, shell)
        os.killpg(shell.pid, signal.SIGINT)
        shell.wait(60)
        assert (tmp_path / "status").read_text().split() == [str(EXIT_STOPPED), str(128 + signal.SIGINT)]
        assert list_checkpoints(out) == [max(losses(out))]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(shell.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_run_saves_when_its_terminal_is_closed(undisturbed, tmp_path):
    """A lost connection: SIGHUP, and every later print to the terminal fails."""
    out = tmp_path / "run"
    pid, terminal = pty.fork()
    if pid == 0:
        words = ["-m", "flacuna_jax.train", f"--config={undisturbed / 'config.yaml'}", f"--output_dir={out}", *LONG]
        os.execve(sys.executable, [sys.executable, *words], {**os.environ, "TERM": "xterm"})
    try:
        deadline = time.monotonic() + 120
        while steps_logged(out) <= 5:
            assert time.monotonic() < deadline
            os.read(terminal, 65536)
    finally:
        os.close(terminal)
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == EXIT_STOPPED
    assert list_checkpoints(out) == [max(losses(out))]


def test_a_report_that_cannot_be_written_does_not_change_the_status(undisturbed, tmp_path, capsys):
    out = tmp_path / "run"
    (out / "report.html").mkdir(parents=True)
    assert run(undisturbed / "config.yaml", f"--output_dir={out}", hooks=at_step(4, terminate)) == EXIT_STOPPED
    assert run(undisturbed / "config.yaml", f"--output_dir={out}") == 0
    # In each start while it runs, and of how it ended.
    assert capsys.readouterr().out.count("warning: report.html could not be written ") == 4
    assert_same_run(out, undisturbed / "run")


def test_a_signal_in_the_last_save_is_answered_before_the_delivery(undisturbed, tmp_path, capsys):
    out, last = tmp_path / "run", max(losses(undisturbed / "run"))

    def be_stopped(state):
        if state.step == last:
            os.kill(os.getpid(), signal.SIGTERM)

    hook = StateHook(call=be_stopped, saves=True)
    assert run(undisturbed / "config.yaml", f"--output_dir={out}", hooks=[hook]) == EXIT_STOPPED
    assert f"saved after step {last}" in capsys.readouterr().err
    assert not (out / "adapter").exists()
    assert run(undisturbed / "config.yaml", f"--output_dir={out}") == 0
    assert_same_run(out, undisturbed / "run")


def test_a_stopped_run_continues_to_the_same_bytes(undisturbed, tmp_path):
    """SIGTERM three times during a run, between saves and during one."""
    out = tmp_path / "run"
    for step in (1, 6, 9):
        assert run(undisturbed / "config.yaml", f"--output_dir={out}", hooks=at_step(step, terminate)) == EXIT_STOPPED
        assert list_checkpoints(out)[-1] in (step, step + 1)
    assert run(undisturbed / "config.yaml", f"--output_dir={out}") == 0
    assert_same_run(out, undisturbed / "run")


def test_a_signal_before_the_first_step_leaves_nothing_behind(undisturbed, tmp_path, capsys, monkeypatch):
    def interrupt(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0)

    monkeypatch.setattr(training_run, "set_up", interrupt)
    assert run(undisturbed / "config.yaml", f"--output_dir={tmp_path / 'run'}") == EXIT_STOPPED
    assert "stopped: SIGTERM" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
