"""Runs whose output_dir is a bucket, against a local emulator of Google Cloud Storage."""

import contextlib
import importlib
import json
import re
import signal
import socket
import threading
import time
from pathlib import Path

import fsspec
import jax.numpy as jnp
import pytest

from flacuna_jax import export, generate
from flacuna_jax.cli import run_verb
from flacuna_jax.huggingface.adapter import Adapter
from flacuna_jax.huggingface.architecture import read_architecture
from flacuna_jax.huggingface.deliver import write_adapter
from flacuna_jax.inference import ModelAddress
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.storage import bucket as bucket_module
from flacuna_jax.storage.checkpoint import Checkpointer, list_checkpoints
from flacuna_jax.storage.local_run import local_run
from tests.faults.runs import delivered, start, wait_for
from tests.small_run import write_run
from tests.test_end_to_end import at_step, losses, run, terminate
from tests.test_export import LORA, random_params, settings
from tests.test_multihost import finish, start_hosts

pytestmark = pytest.mark.usefixtures("compiled_once")

REFUSED = {
    "s3": ("s3://bucket/run", "a run must be in a directory or a gs:// bucket"),
    "no path": ("gs://bucket", "is not of the form gs://BUCKET/PATH"),
    "out of it": ("gs://bucket/../other", "is not of the form gs://BUCKET/PATH"),
    "one slash": ("gs:/bucket/run", "is not of the form gs://BUCKET/PATH"),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, compiled_once) -> Path:
    directory = tmp_path_factory.mktemp("undisturbed")
    assert run(write_run(directory)) == 0
    return directory


@pytest.mark.parametrize(("name", "hint"), REFUSED.values(), ids=REFUSED.keys())
def test_unsupported_or_unreachable_buckets_are_errors(undisturbed, monkeypatch, tmp_path, capsys, name, hint):
    monkeypatch.chdir(tmp_path)
    assert run(undisturbed / "config.yaml", f"--output_dir={name}") == 2
    assert hint in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


class Emulator:
    """Has a bucket named `runs`, which outlives a stop."""

    def __init__(self) -> None:
        emulated = pytest.importorskip("gcp_storage_emulator.server")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            host, port = probe.getsockname()
        self.url = f"http://{host}:{port}"
        storage = emulated.create_server(host, port, in_memory=True, default_bucket="runs")._storage
        self._serve = lambda: emulated.APIThread(host, port, storage)

    def start(self) -> None:
        self._serving = self._serve()
        self._serving.start()
        self._serving.is_running.wait()

    def stop(self) -> None:
        self._serving.join(timeout=1)


@pytest.fixture(scope="module")
def emulator():
    """All child processes use it."""
    pytest.importorskip("gcsfs")
    found = Emulator()
    found.start()
    objects = importlib.import_module("gcp_storage_emulator.handlers.objects")
    download = objects.download

    def with_generation(request, response, storage, *rest):
        """Like the service: TensorStore makes its next write conditional on what it read."""
        with contextlib.suppress(objects.NotFound):  # `download` reports it
            place = request.params["bucket_name"], request.params["object_id"]
            response["x-goog-generation"] = storage.get_file_obj(*place)["generation"]
        return download(request, response, storage, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(objects, "download", with_generation)
        patched.setenv("STORAGE_EMULATOR_HOST", found.url)
        patched.setenv("TENSORSTORE_GCS_HTTP_URL", found.url)
        patched.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "anyone")
        patched.setenv("NO_GCE_CHECK", "true")  # no search for Google's own network
        yield found
    found.stop()


@pytest.fixture
def machine(emulator, tmp_path, monkeypatch):
    """Simulates another machine with other caches. Heartbeats are short, so that tests are fast."""
    monkeypatch.setattr(bucket_module, "BEAT_SECONDS", 0.3)
    monkeypatch.setattr(bucket_module, "SETTLE_SECONDS", 0.1)

    def become(name: str) -> None:
        monkeypatch.setenv("FLACUNA_CACHE", str(tmp_path / name))

    become("first machine")
    return become


def copy_of(name: str, target: Path) -> Path:
    """The bucket's objects as files."""
    files = fsspec.filesystem("gcs", skip_instance_cache=True)
    files.get(f"{name}/", str(target), recursive=True)
    return target


def assert_same_run(name: str, expected: Path, tmp_path: Path) -> Path:
    found = copy_of(name, tmp_path / "copy")
    assert losses(found) == losses(expected)
    assert delivered(found) == delivered(expected)
    return found


def test_a_run_in_a_bucket_equals_a_local_run(undisturbed, machine, tmp_path, capsys):
    out = "gs://runs/whole"
    assert run(undisturbed / "config.yaml", f"--output_dir={out}", "--checkpoint.keep=2") == 0
    found = assert_same_run(out, undisturbed / "run", tmp_path)
    assert sorted(path.name for path in found.iterdir()) == [
        "adapter",
        "checkpoints",
        "config.yaml",
        "metrics.jsonl",
        "report.html",
    ]
    assert list_checkpoints(out) == [12, 14]
    assert "gs://runs/whole has the complete run" in capsys.readouterr().out
    assert run(undisturbed / "config.yaml", f"--output_dir={out}", "--checkpoint.resume=never") == 2
    assert "already contains a run" in capsys.readouterr().err


def test_a_killed_run_continues_on_another_machine_from_the_bucket(undisturbed, machine, tmp_path, capsys):
    out = f"--output_dir={(name := 'gs://runs/killed')}"
    process = start(undisturbed / "config.yaml", out, "--training.epochs=2")
    try:
        wait_for(lambda: list_checkpoints(name), process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    finally:
        process.kill()
        process.stdout.close()
    machine("second machine")
    assert run(undisturbed / "config.yaml", out) == 0
    said = capsys.readouterr().out
    assert "taking over if it is silent" in said
    assert "resuming after step" in said
    assert_same_run(name, undisturbed / "run", tmp_path)


def stopped_after_six(undisturbed: Path, name: str) -> None:
    """Leaves checkpoints 3, 6 and 7 in the bucket."""
    assert (
        run(
            undisturbed / "config.yaml",
            f"--output_dir={name}",
            hooks=at_step(6, terminate),
        )
        == 75
    )
    assert list_checkpoints(name)[:2] == [3, 6]


@pytest.mark.slow
def test_an_incomplete_checkpoint_is_never_used(undisturbed, machine, tmp_path, capsys):
    """Its last object is missing, as after a kill during a save."""
    name = "gs://runs/half"
    stopped_after_six(undisturbed, name)
    newest = list_checkpoints(name)[-1]
    (bucket_module.bucket_path(name) / "checkpoints" / str(newest) / "commit_success.txt").unlink()
    machine("second machine")
    assert run(undisturbed / "config.yaml", f"--output_dir={name}") == 0
    assert f"resuming after step {newest}" not in capsys.readouterr().out
    assert_same_run(name, undisturbed / "run", tmp_path)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_skipped_and_set_aside(undisturbed, machine, tmp_path):
    """Continued in a separate process, because this one has a cache of its writes."""
    name = "gs://runs/damaged"
    stopped_after_six(undisturbed, name)
    newest = list_checkpoints(name)[-1]
    arrays = bucket_module.bucket_path(name) / "checkpoints" / str(newest) / "trainable"
    for part in (*(arrays / "d").iterdir(), *(arrays / "ocdbt.process_0" / "d").iterdir()):
        part.write_bytes(bytes(len(part.read_bytes())))
    process = start(undisturbed / "config.yaml", f"--output_dir={name}")
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert f"{newest} is damaged and was skipped" in said
    found = assert_same_run(name, undisturbed / "run", tmp_path)
    assert (found / "unreadable_checkpoints" / f"{newest}.0" / "meta").is_dir()


@pytest.fixture
def stranger():
    """The heartbeat of another run during the test."""
    over = threading.Event()

    def live(name: str) -> None:
        lease, beat = bucket_module.bucket_path(name) / "run.lock", 0
        while not over.is_set():
            beat += 1
            lease.write_text(json.dumps({"owner": "other", "host": "elsewhere", "pid": 7, "beat": beat}))
            time.sleep(0.1)

    threads = []

    def start_living(name: str) -> None:
        threads.append(threading.Thread(target=live, args=(name,)))
        threads[-1].start()

    yield start_living
    over.set()
    for thread in threads:
        thread.join()


def test_a_bucket_in_use_by_another_run_is_an_error(undisturbed, machine, stranger, capsys):
    stranger("gs://runs/taken")
    time.sleep(0.3)
    assert run(undisturbed / "config.yaml", "--output_dir=gs://runs/taken") == 2
    assert "is in use by another run (pid 7 on elsewhere)" in capsys.readouterr().err
    assert list_checkpoints("gs://runs/taken") == []


def test_a_run_whose_bucket_is_taken_over_stops(undisturbed, machine, stranger, capsys):
    """Two starts in the same second, or one that was believed dead."""
    lease = bucket_module.bucket_path("gs://runs/lost") / "run.lock"

    def be_taken_over() -> None:
        """Returns once the run's own heartbeat, which may overwrite the stranger's once, has given up."""
        stranger("gs://runs/lost")
        foreign = 0
        while foreign < 20:
            with contextlib.suppress(ValueError):  # it was written between reading its size and its content
                foreign = foreign + 1 if json.loads(lease.read_text())["owner"] == "other" else 0
            time.sleep(0.05)

    hooks = at_step(4, be_taken_over)
    assert run(undisturbed / "config.yaml", "--output_dir=gs://runs/lost", hooks=hooks) == 2
    assert "has been taken over by pid 7 on elsewhere" in capsys.readouterr().err
    assert list_checkpoints("gs://runs/lost") == [3]


@pytest.fixture
def finished(machine, story_llama, tmp_path) -> Path:
    """The local copy of gs://runs/read: a checkpoint of step 5, and the adapter of step 10."""
    path, config = tmp_path / "read", read_architecture(story_llama)
    path.mkdir()
    (path / "config.yaml").write_text(settings(story_llama, path, LORA.model_dump(mode="json")).to_yaml())
    write_adapter(
        path / "adapter", Adapter(ModelSpec(config, LORA), random_params(config, 10), "base"), config, trained=True
    )
    fsspec.filesystem("gcs").put(f"{path}/", "gs://runs/read/", recursive=True)
    for place in (path, "gs://runs/read"):
        with Checkpointer(place, keep=1, asynchronous=False) as checkpointer:
            params = {name: jnp.asarray(value) for name, value in random_params(config, 5).items()}
            checkpointer.save(5, params, {"count": jnp.zeros(())}, {})
    return path


@pytest.mark.parametrize("options", [[], ["--step", "5"]], ids=["final", "step 5"])
def test_an_export_reads_the_bucket(finished, tmp_path, options):
    for place, name in ((finished, "one"), ("gs://runs/read", "other")):
        assert run_verb(export.main, [str(place), str(tmp_path / name), "--format", "adapter", *options]) == 0
    one, other = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "other"))
    assert one == other


def test_a_copy_follows_the_bucket(finished, story_llama, capsys):
    address = ModelAddress.parse(f"{story_llama}+gs://runs/read/adapter")
    assert address.name.endswith("+read")
    weights = address.adapter / "adapter_model.safetensors"
    assert weights.read_bytes() == (finished / "adapter" / weights.name).read_bytes()
    assert (address.adapter.parent / "config.yaml").is_file()  # the settings for reading the base
    before = weights.stat()
    local_run("gs://runs/read")
    assert weights.stat().st_ino == before.st_ino  # unchanged, so not copied
    time.sleep(1)  # the resolution of times in a bucket
    there = bucket_module.bucket_path("gs://runs/read/adapter")
    (there / weights.name).write_bytes(bytes(before.st_size))
    (there / "README.md").unlink()
    local_run("gs://runs/read/adapter")
    assert weights.read_bytes() == bytes(before.st_size)
    assert sorted(path.name for path in weights.parent.iterdir()) == ["adapter_config.json", weights.name]
    assert run_verb(generate.main, ["--run", "gs://runs/none", "Why?"]) == 2
    assert "gs://runs/none has no run" in capsys.readouterr().err


@pytest.mark.slow
def test_two_hosts_write_into_one_bucket(undisturbed, machine, tmp_path):
    name = "gs://runs/hosts"
    results = finish(start_hosts(undisturbed / "config.yaml", f"--output_dir={name}", "--mesh.fsdp=4"))
    assert [status for status, _ in results] == [0, 0], results
    assert list_checkpoints(name) == [9, 12, 14]
    found, expected = losses(copy_of(name, tmp_path / "copy")), losses(undisturbed / "run")
    # The rows are on other devices, so the summation order differs.
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_a_bucket_that_stops_answering(undisturbed, machine, emulator):
    """Between two saves; during a save, TensorStore would retry for a quarter of an hour."""
    name = "gs://runs/away"
    command = [
        undisturbed / "config.yaml",
        f"--output_dir={name}",
        "--training.epochs=8",
        "--checkpoint.every_steps=25",
    ]
    process = start(*command)
    try:
        wait_for(lambda: list_checkpoints(name), process)
        emulator.stop()
        said, _ = process.communicate(timeout=400)
    finally:
        process.kill()
        emulator.start()
    assert process.returncode == 2, said
    assert re.search(rf"^error: (checkpoint )?{name}\S* cannot be (read or )?written", said, re.MULTILINE), said
    again = start(*command)
    said, _ = again.communicate(timeout=400)
    assert again.returncode == 0, said
    assert "resuming after step" in said
    assert max(losses(bucket_module._working_directory(name))) == max(list_checkpoints(name))
