"""External faults during real runs. In every case the next start continues to the bytes of an undisturbed run, or
reports why it cannot."""

import contextlib
import ctypes
import dataclasses
import fcntl
import json
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flacuna_jax.cli import EXIT_STOPPED
from flacuna_jax.run import training_run
from flacuna_jax.run.stop import SIGNALS
from flacuna_jax.storage.checkpoint import list_checkpoints
from flacuna_jax.training.evaluator import HeldOut
from flacuna_jax.training.loop import StateHook
from tests.small_run import SIZES, write_run
from tests.test_end_to_end import Stopped, at_step, losses, run, terminate

pytestmark = pytest.mark.usefixtures("compiled_once", "signals_of_a_terminal")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, compiled_once) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed")
    assert run(write_run(directory)) == 0
    return directory


def assert_same_run(directory: Path, expected: Path) -> None:
    assert losses(directory) == losses(expected)
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


# --- The disk ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [pytest.param(2, marks=pytest.mark.slow), 4, pytest.param(7, marks=pytest.mark.slow)])
def test_a_disk_that_fills_up(undisturbed, tmp_path, capsys, at):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=2m", "tmpfs") as disk:
        out, filler = disk / "run", disk / "filler"
        status = run(undisturbed / "config.yaml", f"--output_dir={out}", hooks=at_step(at, lambda: fill(filler)))
        said = capsys.readouterr().err
        assert status == 2
        assert "cannot be written: No space left on device" in said
        assert "Traceback" not in said
        filler.unlink()
        assert run(undisturbed / "config.yaml", f"--output_dir={out}") == 0
        assert_same_run(out, undisturbed / "run")


def test_a_disk_that_is_full_when_the_result_is_written(undisturbed, tmp_path, capsys):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=2m", "tmpfs") as disk:
        out, last = disk / "run", max(losses(undisturbed / "run"))

        def fill_after_the_last_save(state):
            if state.step == last:
                fill(disk / "filler")

        hook = StateHook(call=fill_after_the_last_save, saves=True)
        assert run(undisturbed / "config.yaml", f"--output_dir={out}", hooks=[hook]) == 2
        said = capsys.readouterr().err
        assert f"{out / 'adapter'} cannot be written: No space left on device" in said
        assert "Traceback" not in said
        (disk / "filler").unlink()
        assert run(undisturbed / "config.yaml", f"--output_dir={out}") == 0
        assert_same_run(out, undisturbed / "run")
        assert not list(out.glob("adapter.*"))


@pytest.mark.slow
def test_a_disk_that_fills_up_under_an_asynchronous_save(tmp_path):
    """The save fails after the step; the run ends with the next step, and the process exits."""
    config = write_run(tmp_path / "input", lora=None, training={"epochs": 8, "learning_rate": 1e-4})
    whole = start(config, f"--output_dir={tmp_path / 'whole'}")
    assert whole.wait(200) == 0
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=3m", "tmpfs") as disk:
        out, filler = disk / "run", disk / "filler"
        process = start(config, f"--output_dir={out}")
        wait_for(lambda: list_checkpoints(out), process)
        fill(filler)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 2, said
        assert "cannot be written: No space left on device" in said
        assert "Traceback" not in said
        filler.unlink()
        again = start(config, f"--output_dir={out}")
        assert again.wait(200) == 0, again.stdout.read()
        assert_same_run(out, tmp_path / "whole")


@pytest.mark.parametrize("at", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_a_disk_that_becomes_read_only(undisturbed, tmp_path, capsys, at):
    with mounted(tmp_path / "disk", "-t", "tmpfs", "tmpfs") as disk:
        out = disk / "run"

        def protect():
            # A read-only mount over it, as the system does for a failing device; open files stay open.
            subprocess.run(["mount", "--bind", str(disk), str(disk)], check=True)
            subprocess.run(["mount", "-o", "remount,bind,ro", str(disk)], check=True)

        try:
            status = run(undisturbed / "config.yaml", f"--output_dir={out}", hooks=at_step(at, protect))
        finally:
            subprocess.run(["umount", str(disk)], capture_output=True)
        said = capsys.readouterr().err
        assert status == 2
        assert "Read-only file system" in said
        assert "Traceback" not in said
        assert run(undisturbed / "config.yaml", f"--output_dir={out}") == 0
        assert_same_run(out, undisturbed / "run")


@pytest.mark.parametrize("at", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_an_output_directory_that_vanishes(undisturbed, tmp_path, capsys, at):
    """Removed between two saves, and during a save."""
    out = tmp_path / "run"
    assert run(undisturbed / "config.yaml", f"--output_dir={out}", hooks=at_step(at, lambda: shutil.rmtree(out))) == 2
    said = capsys.readouterr().err
    assert "is gone: its directory was removed, moved or unmounted" in said
    assert run(undisturbed / "config.yaml", f"--output_dir={out}") == 0
    assert_same_run(out, undisturbed / "run")


def test_an_output_directory_that_is_moved_back(undisturbed, tmp_path, capsys):
    out, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    assert run(undisturbed / "config.yaml", f"--output_dir={out}", hooks=at_step(5, lambda: out.rename(elsewhere))) == 2
    assert "is gone" in capsys.readouterr().err
    shutil.rmtree(out, ignore_errors=True)
    elsewhere.rename(out)
    assert list_checkpoints(out) == [3]
    assert run(undisturbed / "config.yaml", f"--output_dir={out}") == 0
    assert_same_run(out, undisturbed / "run")


def test_a_result_without_checkpoints_is_not_overwritten(undisturbed, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(undisturbed / "run", out)
    shutil.rmtree(out / "checkpoints")
    before = delivered(out), losses(out)
    assert run(undisturbed / "config.yaml", f"--output_dir={out}") == 2
    assert "contains adapter of a run without checkpoints" in capsys.readouterr().err
    assert (delivered(out), losses(out)) == before


def test_a_run_with_more_steps_than_configured_is_an_error(undisturbed, tmp_path, capsys):
    arguments = undisturbed / "config.yaml", f"--output_dir={tmp_path / 'run'}", "--training.schedule=constant"
    assert run(*arguments, "--training.max_steps=3") == 0
    before = delivered(tmp_path / "run")
    assert run(*arguments, "--training.max_steps=2") == 2
    assert "contains a run that is at step 3, beyond the 2 steps of these settings" in capsys.readouterr().err
    assert delivered(tmp_path / "run") == before


@pytest.mark.parametrize("place", [0.25, pytest.param(0.7, marks=pytest.mark.slow)])
def test_one_changed_number_of_the_base_is_detected(undisturbed, tmp_path, capsys, place):
    """Its fingerprint, which samples the files, is the same, but not the values in memory."""
    base, out = tmp_path / "base", tmp_path / "run"
    config = undisturbed / "config.yaml"
    assert run(config, f"--output_dir={tmp_path / 'full'}", "--lora=null", "--training.max_steps=1") == 0
    (tmp_path / "full" / "model").rename(base)
    arguments = config, f"--output_dir={out}", f"--model={{path: {base}, dtype: float32}}"
    assert run(*arguments, hooks=at_step(4, terminate)) == EXIT_STOPPED
    tensors = load_file(base / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"].copy()
    embedding.flat[int(place * embedding.size)] += 1
    save_file({**tensors, "model.embed_tokens.weight": embedding}, base / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    assert run(*arguments) == 2
    said = capsys.readouterr().err
    assert "base_checksum: " in said
    assert "--checkpoint.allow_changes=[base]" in said
    assert run(*arguments, "--checkpoint.allow_changes=[base]") == 0
    assert "results differ from here on, accepted by checkpoint.allow_changes: base_checksum" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["meta/metadata", pytest.param("trainable/manifest.ocdbt", marks=pytest.mark.slow)])
def test_a_checkpoint_without_read_permission_does_not_count_as_damaged(undisturbed, file):
    """Copied by another user: the message is about permission, and nothing is set aside. Root may read everything, so
    the test becomes another user, who has no access to pytest's own directories."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("becomes another user, which needs root and setpriv")
    script = (
        "import sys; from flacuna_jax.storage.checkpoint import restore_adapters\n"
        "from flacuna_jax.cli import run_verb; sys.exit(run_verb(lambda a: restore_adapters(a[0]) and 0, sys.argv[1:]))"
    )
    python = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", sys.executable, "-c"]
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        out = Path(place, "run")
        shutil.copytree(undisturbed / "run", out)
        newest = out / "checkpoints" / str(list_checkpoints(out)[-1])
        for path in out.rglob("*"):
            path.chmod(0o777)
        (newest / file).chmod(0o600)
        probe = "import os, sys, jax, flacuna_jax; sys.exit(not os.path.isdir(sys.argv[1]))"
        if subprocess.run([*python, probe, out], capture_output=True, cwd=ROOT).returncode:
            pytest.skip("another user has no access to the interpreter, the package or TMPDIR")
        result = subprocess.run([*python, script, out], capture_output=True, text=True, cwd=ROOT)
        assert "cannot be read: Permission denied" in result.stderr
        assert result.returncode == 2
        assert newest.is_dir()


# --- Power cuts --------------------------------------------------------------------------------------------------

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
            saver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            try:
                said = saver.stdout.readline()
                while "damaged and was skipped" in said:  # renamed, but not yet on the disk at the power cut
                    said = saver.stdout.readline()
                word, begun_at = said.split()
                assert word == "started"
                assert int(begun_at) >= reported - 1, "reported checkpoints are intact"
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


# --- Signals -----------------------------------------------------------------------------------------------------

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
    """`train | tee log`: a terminal sends SIGINT to both, and nobody reads the output of the run while it saves."""
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


# --- Evaluations -------------------------------------------------------------------------------------------------

EVALUATED = "--evaluation={every_steps: 5, fraction: 0.2, samples: 1, sample_tokens: 4}"


@pytest.fixture(scope="module")
def evaluated(undisturbed, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "run"
    assert run(undisturbed / "config.yaml", f"--output_dir={out}", EVALUATED) == 0
    return out


def evaluations(directory: Path) -> list[tuple]:
    """Metrics and sample answers, in the order of the files."""
    measured = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    answered = map(json.loads, (directory / "samples.jsonl").read_text().splitlines())
    losses_by_step = [(record["step"], record["eval/loss"]) for record in measured if "eval/loss" in record]
    return [*losses_by_step, *((record["step"], record["answer"]) for record in answered)]


def assert_same_evaluated_run(directory: Path, expected: Path) -> None:
    assert_same_run(directory, expected)
    assert evaluations(directory) == evaluations(expected)


@pytest.mark.parametrize("at", ["the last step", pytest.param("a step that is due", marks=pytest.mark.slow)])
def test_an_evaluation_skipped_by_a_stop_is_done_by_the_next_start(undisturbed, evaluated, tmp_path, at):
    out, step = tmp_path / "run", max(losses(evaluated)) if at == "the last step" else 10
    arguments = undisturbed / "config.yaml", f"--output_dir={out}", EVALUATED
    assert run(*arguments, hooks=at_step(step, terminate)) == EXIT_STOPPED
    assert step not in dict(evaluations(out))
    assert run(*arguments) == 0
    assert_same_evaluated_run(out, evaluated)


def test_an_evaluation_after_the_last_checkpoint_is_repeated_once(
    undisturbed, evaluated, tmp_path, monkeypatch, capsys
):
    """Stopped before it, stopped again during it, killed directly after it; a kill is an exception here, which saves
    nothing."""
    out = tmp_path / "run"
    arguments = undisturbed / "config.yaml", f"--output_dir={out}", EVALUATED
    assert run(*arguments, hooks=at_step(10, terminate)) == EXIT_STOPPED
    measure = HeldOut.measure

    def stop_in_it(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        return measure(*given)

    with monkeypatch.context() as patched:
        patched.setattr(HeldOut, "measure", stop_in_it)
        assert run(*arguments) == EXIT_STOPPED
    assert list_checkpoints(out)[-1] == 10, "no step is done before the pending evaluation"

    def killed():
        raise Stopped

    with pytest.raises(Stopped):
        run(*arguments, hooks=at_step(11, killed))
    assert 10 in dict(evaluations(out))
    assert run(*arguments) == 0
    assert "removed records newer than the checkpoint, after step 10: 2" in capsys.readouterr().out
    assert_same_evaluated_run(out, evaluated)


# --- Kills -------------------------------------------------------------------------------------------------------


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
