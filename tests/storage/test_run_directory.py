"""One run at a time in a directory, and atomic files."""

import json
import os
import signal
import subprocess
import sys

import pytest

from flacuna_jax.errors import UserError
from flacuna_jax.storage.run_directory import CutBack, RunDirectory, open_run_directory
from flacuna_jax.whole_files import write_atomically

HOLDER = """
import sys, time
from pathlib import Path
from flacuna_jax.storage.run_directory import open_run_directory
with open_run_directory(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_records(path, steps, tail=""):
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0 / step}) + "\n" for step in steps) + tail)


def test_creates_the_directory_with_its_parents(tmp_path):
    with open_run_directory(tmp_path / "runs" / "first") as run:
        run.write_config("seed: 1\n")
    assert (tmp_path / "runs" / "first" / "config.yaml").read_text() == "seed: 1\n"


def test_a_second_run_fails_with_the_pid_and_a_killed_one_leaves_no_lock(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        with (
            pytest.raises(UserError, match=rf"in use by another run \(pid {holder.pid} on "),
            open_run_directory(tmp_path),
        ):
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    with open_run_directory(tmp_path):
        assert f"pid {os.getpid()} " in (tmp_path / ".lock").read_text()


def test_removing_the_lock_file_does_not_permit_a_second_run(tmp_path):
    with open_run_directory(tmp_path):
        (tmp_path / ".lock").unlink()
        with (
            pytest.raises(UserError, match="in use by another run, whose lock file was removed"),
            open_run_directory(tmp_path),
        ):
            pass
    with open_run_directory(tmp_path):
        pass


def test_the_lock_ends_with_the_block_even_after_an_exception(tmp_path):
    with pytest.raises(KeyError), open_run_directory(tmp_path):
        raise KeyError
    with open_run_directory(tmp_path):
        pass


def test_other_hosts_neither_lock_nor_write(tmp_path):
    with open_run_directory(tmp_path / "run"), open_run_directory(tmp_path / "run", primary=False) as other:
        assert other.path == tmp_path / "run"
    with open_run_directory(tmp_path / "absent", primary=False):
        assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("product", ["config.yaml", "metrics.jsonl", "checkpoints", "adapter"])
def test_a_used_directory_is_an_error_with_resume_never(tmp_path, product):
    (tmp_path / "notes.txt").write_text("a user's own file")
    with open_run_directory(tmp_path, resume="never"):
        pass
    (tmp_path / product).mkdir()
    with (
        pytest.raises(UserError, match=rf"already contains a run \({product}\)"),
        open_run_directory(tmp_path, resume="never"),
    ):
        pass
    with open_run_directory(tmp_path, resume="auto"):
        pass


def test_metrics_are_cut_back_to_the_checkpoint_without_the_torn_line(tmp_path):
    run = RunDirectory(tmp_path, str(tmp_path))
    write_records(run.metrics, range(1, 8), tail='{"step": 8, "lo')
    assert run.cut_back(5) == CutBack(kept=5, later=2, torn=1)
    assert [record["step"] for record in records(run.metrics)] == [1, 2, 3, 4, 5]
    assert run.cut_back(5) == CutBack(kept=5, later=0, torn=0)


@pytest.mark.parametrize(
    "tail",
    [b"\0\0\0\0", b"null\n", b'{"step": 3, "loss": 0.5', b'{"step": 1, "x": "\xed\xa0\x80"}\n', b"\xff\xfe{\0}\0"],
)
def test_every_kind_of_torn_end_is_removed(tmp_path, tail):
    run = RunDirectory(tmp_path, str(tmp_path))
    write_records(run.metrics, [1, 2])
    with run.metrics.open("ab") as file:
        file.write(tail)
    assert run.cut_back(9).torn == 1
    assert len(records(run.metrics)) == 2


def test_every_length_of_the_file_can_be_continued(tmp_path):
    run = RunDirectory(tmp_path, str(tmp_path))
    write_records(run.metrics, [1, 2, 3])
    whole = run.metrics.read_bytes()
    for size in range(len(whole) + 1):
        run.metrics.write_bytes(whole[:size])
        run.cut_back(2)
        with run.metrics.open("a") as file:
            file.write('{"step": 4}\n')
        steps = [record["step"] for record in records(run.metrics)]
        assert steps in ([4], [1, 4], [1, 2, 4])


def test_a_complete_last_line_without_its_newline_is_kept(tmp_path):
    run = RunDirectory(tmp_path, str(tmp_path))
    write_records(run.metrics, [1], tail='{"step": 2}')
    assert run.cut_back(2).kept == 2
    assert run.metrics.read_text().endswith('{"step": 2}\n')


def test_a_start_from_zero_empties_metrics_and_accepts_a_missing_file(tmp_path):
    run = RunDirectory(tmp_path, str(tmp_path))
    assert run.cut_back(7) == CutBack(0, 0, 0)
    write_records(run.metrics, [1, 2])
    assert run.cut_back(0) == CutBack(kept=0, later=2, torn=0)
    assert run.metrics.read_text() == ""


def test_records_without_a_step_are_kept_on_resume(tmp_path):
    run = RunDirectory(tmp_path, str(tmp_path))
    run.metrics.write_text('{"kind": "plan", "rows": 5}\n{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n')
    run.cut_back(1)
    assert records(run.metrics) == [{"kind": "plan", "rows": 5}, {"step": 1, "loss": 2.0}]


def test_an_evaluation_after_the_checkpoint_is_removed_with_its_samples(tmp_path):
    """Saved after step 2 before its evaluation, continued and evaluated, killed: it will be evaluated again."""
    run = RunDirectory(tmp_path, str(tmp_path))
    steps = '{"step": 1, "loss": 2.0}\n{"step": 1, "kind": "evaluation"}\n{"step": 2, "loss": 1.0}\n'
    run.metrics.write_text(steps + '{"step": 2, "kind": "evaluation"}\n')
    run.samples.write_text('{"step": 1, "answer": "a"}\n{"step": 2, "answer": "b"}\n')
    assert run.cut_back(2) == CutBack(kept=4, later=0, torn=0)
    assert run.cut_back(2, measure_again=True) == CutBack(kept=3, later=1, torn=0)
    assert run.metrics.read_text() == steps
    assert records(run.samples) == [{"step": 1, "answer": "a"}]


@pytest.mark.parametrize("product", ["adapter", "model"])
def test_a_result_without_checkpoints_is_not_overwritten(tmp_path, product):
    run = RunDirectory(tmp_path, str(tmp_path))
    run.require_undelivered()
    (tmp_path / product).mkdir()
    with pytest.raises(UserError, match=f"contains {product} of a run without checkpoints"):
        run.require_undelivered()


def test_a_path_through_a_file_is_one_message(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="file/run cannot be written: Not a directory"),
        open_run_directory(tmp_path / "file" / "run"),
    ):
        pass


def test_a_full_disk_leaves_the_old_content(small_disk):
    path = small_disk / "config.yaml"
    write_atomically(path, "old")
    with pytest.raises(UserError, match=r"config.yaml cannot be written: No space left on device"):
        write_atomically(path, "x" * 2_000_000)
    assert path.read_text() == "old"
    assert list(small_disk.iterdir()) == [path]


def test_a_read_only_disk_is_one_message(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with (
        pytest.raises(UserError, match="cannot be written: Read-only file system"),
        open_run_directory(small_disk / "run"),
    ):
        pass
