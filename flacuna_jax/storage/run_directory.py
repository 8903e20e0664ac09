"""A run's output directory: locked by one run at a time, with files that are written atomically.

config.yaml  metrics.jsonl  samples.jsonl  checkpoints/  bad_steps/  adapter/ or model/  report.html  TensorBoard events
"""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flacuna_jax.errors import UserError
from flacuna_jax.whole_files import write_atomically

LOCK = ".lock"
# Files of a run; a directory with any of these counts as used.
PRODUCTS = ("config.yaml", "metrics.jsonl", "checkpoints", "adapter", "model", "report.html")
DELIVERED = ("adapter", "model")


@dataclass(frozen=True)
class CutBack:
    """Result of `RunDirectory.cut_back` for metrics.jsonl: number of kept records, of removed later records, and of
    removed unreadable lines."""

    kept: int
    later: int
    torn: int


@dataclass(frozen=True)
class RunDirectory:
    """Paths of a run, and methods that write its small files; created by `open_run_directory`.

    Args:
      path: the directory of small files; the working directory if output_dir is a bucket.
      output: the run's name for its user, which is also the location of its checkpoints.
      publish: copies the small files to `output`; called before each checkpoint.
    """

    path: Path
    output: str
    publish: Callable[[], None] = lambda: None

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        """Sample answers of evaluations, a JSON object per line."""
        return self.path / "samples.jsonl"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def require_undelivered(self) -> None:
        """Raises `UserError` if there is a result, which a run from the first step would overwrite."""
        found = [name for name in DELIVERED if (self.path / name).exists()]
        if found:
            raise UserError(
                f"output_dir {self.output} contains {' and '.join(found)} of a run without checkpoints: the run would "
                "start again, and overwrite that at its end; move it away, or choose another output_dir"
            )

    def write_config(self, text: str) -> None:
        """Writes the resolved config.

        Raises:
          UserError: it cannot be written.
        """
        write_atomically(self.config, text)

    def cut_back(self, step: int, measure_again: bool = False) -> CutBack:
        """Removes records from metrics.jsonl and samples.jsonl that are later than the checkpoint of `step`; at step 0,
        all records.

        A run that was killed after a checkpoint has logged steps that the resumed run will log again, and with
        `measure_again` possibly the evaluation after the step of the checkpoint, which the checkpoint does not include.
        Records without a step are kept. Lines that are not a JSON object (because of a kill or a power cut) are
        removed.

        Returns:
          The changes to metrics.jsonl.

        Raises:
          UserError: a file cannot be read or written.
        """

        def known(record: dict[str, object], of_evaluation: bool) -> bool:
            return step > 0 and _step_of(record) <= step - (of_evaluation and measure_again)

        _cut_back(self.samples, lambda record: known(record, True))
        return _cut_back(self.metrics, lambda record: known(record, record.get("kind") == "evaluation"))


def _cut_back(path: Path, known: Callable[[dict[str, object]], bool]) -> CutBack:
    with _as_user_error(path):
        raw = path.read_bytes() if path.exists() else b""
    records = [(line, json_object(line)) for line in raw.split(b"\n") if line.strip()]
    kept = [line for line, record in records if record is not None and known(record)]
    torn = sum(record is None for _, record in records)
    content = b"".join(line + b"\n" for line in kept)
    if content != raw:
        write_atomically(path, content.decode())
    return CutBack(len(kept), len(records) - len(kept) - torn, torn)


@contextlib.contextmanager
def open_run_directory(
    path: Path, *, resume: Literal["auto", "never"] = "auto", primary: bool = True
) -> Iterator[RunDirectory]:
    """Creates and locks a run directory for the duration of a `with` block.

    The lock is the kernel's (flock): it ends with the process that holds it, so there are no stale locks.

    Args:
      path: the output directory, on a file system; parents are created.
      resume: with `never`, a directory that a run has used is an error.
      primary: whether this host is the one that writes; the others of a multi-host run share the directory unlocked.

    Raises:
      UserError: the directory cannot be created, is in use by another run, or is used and `resume` is `never`.
    """
    if not primary:
        yield RunDirectory(path, str(path))
        return
    descriptor = _open_locked(path)
    try:
        directory = _lock_itself(path)
    except BaseException:
        os.close(descriptor)
        raise
    try:
        if resume == "never":
            refuse_used(str(path), [name for name in PRODUCTS if (path / name).exists()])
        yield RunDirectory(path, str(path))
    finally:
        _remove_if_unused(path)
        os.close(descriptor)
        if directory is not None:
            os.close(directory)


def refuse_used(output_dir: str, used: Sequence[str]) -> None:
    """Raises `UserError` if a directory that must be new contains files of a run."""
    if used:
        raise UserError(
            f"output_dir {output_dir} already contains a run ({', '.join(used)}) and checkpoint.resume is never; "
            "choose another output_dir, or set checkpoint.resume: auto to continue that run"
        )


def _remove_if_unused(path: Path) -> None:
    """Removes the lock, which is still held, and the directory if it is empty then, so that a run with invalid input
    leaves nothing behind. The directory of checkpoints is made before the base's weights are read."""
    with contextlib.suppress(OSError):
        (path / "checkpoints").rmdir()  # fails unless it is empty
    with contextlib.suppress(OSError):
        if [entry.name for entry in path.iterdir()] == [LOCK]:
            (path / LOCK).unlink()
            path.rmdir()


def _open_locked(path: Path) -> int:
    """Descriptor of the held lock. An ending run may remove its lock file between our opening and locking it."""
    while True:
        with _as_user_error(path):
            path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(path, descriptor)
            if os.path.samestat(os.fstat(descriptor), os.stat(path / LOCK)):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock_itself(path: Path) -> int | None:
    """Descriptor of a lock on the directory, which stays valid if someone removes the lock file. None if directories
    cannot be locked, as on NFS."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"output_dir {path} is in use by another run, whose lock file was removed; wait for it or stop it"
        ) from None
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _lock(path: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "an unknown process"
        raise UserError(f"output_dir {path} is in use by another run ({owner}); wait for it or stop it") from None
    except OSError as error:
        raise UserError(
            f"output_dir {path} cannot be locked ({error.strerror}), so a second run in it would not be detected; "
            "choose one on another file system"
        ) from None
    # For information only: the lock is valid even if the disk is full.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def json_object(line: bytes) -> dict[str, Any] | None:
    """Parses a line of metrics.jsonl or samples.jsonl; None if it is not a JSON object."""
    try:
        record = json.loads(line.decode())
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _step_of(record: dict[str, object]) -> float:
    step = record.get("step", 0)
    return step if isinstance(step, int | float) else 0


@contextlib.contextmanager
def _as_user_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
