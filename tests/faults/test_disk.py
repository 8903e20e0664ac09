"""Full, read-only, removed and moved output directories, damaged files.

In every case the next start continues to the bytes of an undisturbed run, or reports why it cannot.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from flacuna_jax.cli import EXIT_STOPPED
from flacuna_jax.storage.checkpoint import list_checkpoints
from flacuna_jax.training.loop import StateHook
from tests.faults.runs import ROOT, assert_same_run, delivered, fill, mounted, start, wait_for
from tests.small_run import write_run
from tests.test_end_to_end import at_step, losses, run, terminate

pytestmark = pytest.mark.usefixtures("compiled_once", "signals_of_a_terminal")


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
    assert "may differ from here on, accepted by checkpoint.allow_changes: base_checksum" in capsys.readouterr().out


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
