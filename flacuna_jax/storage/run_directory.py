"""A run's output directory: locked by one run at a time, its files written whole or not at all.

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
# What a run leaves behind; any of these makes a directory a used one.
PRODUCTS = ("config.yaml", "metrics.jsonl", "checkpoints", "adapter", "model", "report.html")
DELIVERED = ("adapter", "model")


@dataclass(frozen=True)
class CutBack:
    """What `RunDirectory.cut_back` did to metrics.jsonl: records kept, removed as later, and lines removed
    as unreadable."""

    kept: int
    later: int
    torn: int


@dataclass(frozen=True)
class RunDirectory:
    """Paths of a run and the writing of its small files; made by `open_run_directory`.

    Args:
      path: where small files are written; the working directory if output_dir is a bucket.
      output: what the run's user calls it, and where its checkpoints are.
      publish: makes the small files seen where `output` is; called before each checkpoint.
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
        """Raises `UserError` if there is a result, which a run from the first step on would write over."""
        found = [name for name in DELIVERED if (self.path / name).exists()]
        if found:
            raise UserError(
                f"output_dir {self.output} holds {' and '.join(found)} of a run whose checkpoints are gone: it would "
                "begin again, and write over that at its end; move it away, or choose another output_dir"
            )

    def write_config(self, text: str) -> None:
        """Writes the resolved config.

        Raises:
          UserError: it cannot be written.
        """
        write_atomically(self.config, text)

    def cut_back(self, step: int, measure_again: bool = False) -> CutBack:
        """Leaves in metrics.jsonl and samples.jsonl what was known at the checkpoint of `step`; at step 0, nothing.

        A run killed after a checkpoint has logged steps that the resumed run will log again, and with `measure_again`
        perhaps the evaluation after that very step, of which the checkpoint does not know. Records without a step
        stay. Lines that are no JSON object (the torn last one, or what a power cut made of it) are removed.

        Returns:
          What became of metrics.jsonl.

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

    The lock is the kernel's (flock): it ends with the process that holds it, however that ends, so there is no stale
    lock to clean up.

    Args:
      path: the output directory, on a file system; parents are created.
      resume: `never` refuses a directory that a run has used.
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
    """Raises `UserError` if there are products of a run in a directory that must be new."""
    if used:
        raise UserError(
            f"output_dir {output_dir} holds a run already ({', '.join(used)}) and checkpoint.resume is never; "
            "choose another output_dir, or checkpoint.resume: auto to continue that run"
        )


def _remove_if_unused(path: Path) -> None:
    """A run whose input proves wrong leaves no trace: its lock, still held here, and the directory if that was all."""
    with contextlib.suppress(OSError):
        if [entry.name for entry in path.iterdir()] == [LOCK]:
            (path / LOCK).unlink()
            path.rmdir()


def _open_locked(path: Path) -> int:
    """Descriptor of the held lock. A run that leaves may remove its lock file between our opening and locking it."""
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
    """Descriptor of a lock on the directory, which holds though somebody takes the file for a stale one and removes it.
    None where directories cannot be locked, as on NFS."""
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
            f"output_dir {path} cannot be locked ({error.strerror}), so that a second run there would not be noticed; "
            "choose one on another file system"
        ) from None
    # Only a courtesy to the next reader: without room for it the lock holds all the same.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def json_object(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl or samples.jsonl; None for what is none."""
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
