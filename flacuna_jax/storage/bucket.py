"""A run whose output_dir is a bucket, gs://BUCKET/PATH.

A bucket stores whole objects and does not support appending, renaming or locks. Therefore a run's small files are
written in a working directory on this machine, with the guarantees of a file system, and copied to the bucket every few
seconds and before each checkpoint. Checkpoints are written directly to the bucket (storage/checkpoint.py). On a start,
only the content of the bucket counts, so a run continues on any machine.

Instead of a lock there is an object, run.lock, that a run writes again every few seconds. It tells a run that lives
from one that was killed without comparing clocks: what does not change for a while belongs to nobody.

Google's storage could make taking it atomic (the precondition ifGenerationMatch), but gcsfs sends one value of that, 0:
"write if there is no object". That cannot take over the lock of a dead run, and to delete that lock first opens the gap
again: of two runs that found it dead, the slower deletes the lock of the faster. etils, through which Orbax and this
module write, passes no precondition at all. So a run writes its lock, waits `SETTLE_SECONDS`, and looks whose it is.
"""

import contextlib
import importlib.util
import json
import logging
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import fsspec
from etils import epath

from flacuna_jax.errors import UserError
from flacuna_jax.storage.run_directory import PRODUCTS, RunDirectory, open_run_directory, refuse_used
from flacuna_jax.user_cache import user_cache

LEASE = "run.lock"
BEAT_SECONDS = 20.0
"""Seconds between two heartbeats, in which a run rewrites run.lock and copies changed files."""
PATIENCE = 3
"""Number of heartbeats without a change of run.lock after which its run is considered dead."""
SETTLE_SECONDS = 2.0
"""Seconds to wait after writing run.lock: of two runs that start at the same time and find no lock, one then finds the
lock of the other."""

_URL = re.compile(r"([a-z][a-z0-9]+):/{1,2}")
_OWNER = ".owner"
_NEEDED = ("config.yaml", "metrics.jsonl", "samples.jsonl", "tensorboard", "wandb")
"""Files that a resumed run continues with."""
_MIRRORED = (*_NEEDED, "report.html", "bad_steps", "adapter", "model", "profile")


def is_bucket(output_dir: str | os.PathLike[str]) -> bool:
    return _URL.match(str(output_dir)) is not None


def bucket_path(output_dir: str) -> epath.Path:
    """The path of a run in a bucket or on a file system."""
    # Cached listings would not show changes by another run or another host.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    # Without permission to query the bucket's type, they warn at every access; errors raise exceptions anyway.
    for name in ("gcsfs", "google.auth"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return epath.Path(output_dir)


def require_supported(output_dir: str) -> None:
    """Raises `UserError` for a bucket that is not supported, or that cannot be reached from this machine."""
    found = _URL.match(output_dir)
    if found is None:
        return
    if found[1] != "gs":
        raise UserError(
            f"{output_dir}: a run must be in a directory or a gs:// bucket, because Orbax writes arrays to no others; "
            "use a local directory or a mounted bucket, and copy it with the bucket's own tool"
        )
    if not re.fullmatch(r"gs://[a-z0-9][a-z0-9._-]+(/[^/]+)+/?", output_dir) or "/../" in f"{output_dir}/":
        raise UserError(f"{output_dir} is not of the form gs://BUCKET/PATH")
    if not (importlib.util.find_spec("gcsfs") or importlib.util.find_spec("tensorflow")):
        raise UserError(f"{output_dir}: buckets need gcsfs: pip install 'flacuna-jax[gcs]'")


def read_text(output_dir: str, name: str) -> str | None:
    """Reads a small file of a run, on disk or in a bucket; None if it does not exist. Raises UserError."""
    path = bucket_path(output_dir) / name
    with talking_to(output_dir):
        try:
            return str(path.read_text())
        except FileNotFoundError:
            return None


@contextlib.contextmanager
def open_output(
    output_dir: str,
    *,
    resume: Literal["auto", "never"] = "auto",
    primary: bool = True,
    say: Callable[[str], None] = print,
) -> Iterator[RunDirectory]:
    """Like `open_run_directory`, but `output_dir` may also be a bucket.

    Raises:
      UserError: as in `open_run_directory`; or the bucket cannot be written, or another run writes there.
    """
    if not is_bucket(output_dir):
        with open_run_directory(Path(output_dir), resume=resume, primary=primary) as directory:
            yield directory
        return
    require_supported(output_dir)
    bucket, working = bucket_path(output_dir), _working_directory(output_dir)
    with open_run_directory(working, primary=primary) as directory:
        if not primary:
            yield RunDirectory(working, output_dir)
            return
        mirror = Mirror(working, output_dir)
        if resume == "never":
            with talking_to(output_dir):
                refuse_used(output_dir, [name for name in PRODUCTS if (bucket / name).exists()])
        with mirror.held(say):
            yield RunDirectory(working, output_dir, mirror.push)


class Mirror:
    """Copies a working directory to a bucket, and makes sure that only this run writes to the bucket.

    Args:
      directory: the working directory; locked by this process.
      output_dir: the bucket's name.
    """

    def __init__(self, directory: Path, output_dir: str) -> None:
        self._directory, self._name, self._bucket = directory, output_dir, bucket_path(output_dir)
        self._owner = _owner(directory)
        self._pushed: dict[Path, tuple[int, int]] = {}
        self._busy, self._renewing = threading.Lock(), threading.Lock()
        self._over = threading.Event()
        self._beats = 0
        self._taken_by: str | None = None
        self._answers = True
        """Whether the bucket answered the last time; otherwise each attempt takes a minute."""

    @contextlib.contextmanager
    def held(self, say: Callable[[str], None]) -> Iterator[None]:
        """Reserves the bucket for this run during the block; first makes the working directory equal to the bucket.

        Raises:
          UserError: another run uses the bucket, or it does not answer.
        """
        self._take(say)
        # Two threads, because copying a whole model takes longer than the time after which a run is considered dead.
        beating = [
            threading.Thread(target=self._on_each_beat, args=(do,), daemon=True) for do in (self._renew, self.push)
        ]
        beating[0].start()
        try:
            self._fetch()
            beating[1].start()
            try:
                yield
            except BaseException:
                if self._answers:
                    with contextlib.suppress(UserError):  # report only the first error
                        self.push()
                raise
            self.push()
            say(f"{self._name} has the complete run")
        finally:
            self._over.set()
            for thread in beating:
                if thread.ident is not None:
                    thread.join()
            with contextlib.suppress(Exception):
                if self._answers and self._taken_by is None and self._is_own(self._lease()):
                    (self._bucket / LEASE).unlink()

    def push(self) -> None:
        """Copies the files that changed since the last call.

        Raises:
          UserError: the bucket cannot be written, or another run has taken it over.
        """
        self._renew()
        with self._busy, talking_to(self._name):
            for name in _MIRRORED:
                for path in _files(self._directory / name):
                    self._copy(path)

    def _renew(self) -> None:
        """Rewrites run.lock. Raises UserError if another run has taken over the bucket, or if it does not answer."""
        with self._renewing, talking_to(self._name):
            self._answers = False
            lease = self._lease()
            self._answers = True
            if self._taken_by is None and not self._is_own(lease):
                self._taken_by = _describe(lease)
            if self._taken_by is not None:
                raise UserError(
                    f"{self._name} has been taken over by {self._taken_by}; this run has stopped writing there"
                )
            self._write_lease()

    def _copy(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                found = os.fstat(file.fileno())
                stamp = (found.st_size, found.st_mtime_ns)
                if self._pushed.get(path) == stamp:
                    return
                with (self._bucket / str(path.relative_to(self._directory))).open("wb") as copy:
                    shutil.copyfileobj(file, copy, 8 << 20)
        except FileNotFoundError:
            if path.exists():
                raise
            return  # the file was replaced in the meantime
        self._pushed[path] = stamp

    def _on_each_beat(self, do: Callable[[], None]) -> None:
        """Calls `do` on each heartbeat until the block ends. Errors are ignored, because the `push` before the next
        checkpoint raises them again."""
        while not self._over.wait(BEAT_SECONDS):
            with contextlib.suppress(UserError):
                do()

    def _take(self, say: Callable[[str], None]) -> None:
        with talking_to(self._name):
            found = self._lease()
            if found is not None and not self._is_own(found):
                seconds = PATIENCE * BEAT_SECONDS
                say(f"{self._name} is in use by {_describe(found)}; taking over if it is silent for {seconds:.0f} s")
                for _ in range(PATIENCE):
                    time.sleep(BEAT_SECONDS)
                    if (now := self._lease()) != found and now is not None:
                        raise UserError(
                            f"output_dir {self._name} is in use by another run ({_describe(now)}); "
                            "wait for it or stop it"
                        )
            self._write_lease()
            time.sleep(SETTLE_SECONDS)
            if not self._is_own(now := self._lease()):
                raise UserError(f"output_dir {self._name} is in use by another run ({_describe(now)})")

    def _fetch(self) -> None:
        """Makes the working directory equal to the bucket, and removes files of earlier runs."""
        for path in self._directory.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif not path.name.startswith("."):
                path.unlink()
        with talking_to(self._name):
            for name in _NEEDED:
                self._fetch_tree(self._bucket / name, self._directory / name)

    def _fetch_tree(self, source: epath.Path, target: Path) -> None:
        if source.is_dir():
            for inner in source.iterdir():
                self._fetch_tree(inner, target / inner.name)
        elif source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
            found = target.stat()
            self._pushed[target] = (found.st_size, found.st_mtime_ns)

    def _lease(self) -> dict[str, Any] | None:
        for _ in range(5):
            try:
                found = json.loads((self._bucket / LEASE).read_text())
            except FileNotFoundError:
                return None
            except ValueError:  # size and content are read separately, and the object was written in between
                time.sleep(0.2)
            else:
                return found if isinstance(found, dict) else {}
        return {}

    def _write_lease(self) -> None:
        self._beats += 1
        # The length is constant, so that a concurrent reader always gets a complete object.
        beat = f"{self._beats:012}"
        lease = {"owner": self._owner, "host": socket.gethostname(), "pid": os.getpid(), "beat": beat}
        (self._bucket / LEASE).write_text(json.dumps(lease))

    def _is_own(self, lease: dict[str, Any] | None) -> bool:
        return lease is not None and lease.get("owner") == self._owner


def _describe(lease: dict[str, Any] | None) -> str:
    return "an unknown process" if lease is None else f"pid {lease.get('pid', '?')} on {lease.get('host', '?')}"


def _owner(directory: Path) -> str:
    """Identifies the writer from this working directory. Its lock is held, so an earlier process with the same name is
    dead."""
    path = directory / _OWNER
    if not path.exists():
        path.write_text(uuid.uuid4().hex)
    return f"{socket.gethostname()}:{path.read_text()}"


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path] if path.is_file() else []
    return sorted(inner for inner in path.rglob("*") if inner.is_file() and not inner.is_symlink())


def _working_directory(output_dir: str) -> Path:
    return user_cache() / "runs" / output_dir.replace("://", "/").rstrip("/")


@contextlib.contextmanager
def talking_to(output_dir: str) -> Iterator[None]:
    """Converts all errors to `UserError`: the libraries retry for a while, and then raise exceptions of many types."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{output_dir} cannot be read or written: {reason}") from None
