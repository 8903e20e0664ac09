"""Stages of an experiment: a command, the files that it reads, the files that it writes, and a record of the run.

A stage that has run with the same command and the same inputs does not run again. One that was stopped is started again
with the same command, and the verbs continue where they stopped. After a change, the stage's directory is deleted.
"""

import dataclasses
import hashlib
import importlib
import json
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from flacuna_jax.cli import EXIT_OK, EXIT_STOPPED, EXIT_USER_ERROR, run_verb
from flacuna_jax.compiler import release_programs
from flacuna_jax.errors import UserError
from flacuna_jax.version import __version__
from flacuna_jax.whole_files import write_atomically

CHUNK = 2**20


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command of an experiment.

    Attributes:
      name: of the record, and in the output.
      command: a module of this package and its arguments, for example ("train", "--config", ...).
      inputs: files or directories whose content the result depends on.
      outputs: files or directories that exist after the command.
      owns: directory that only this stage writes; it is deleted if the stage has changed. None: nothing is deleted.
      python: interpreter of a process for the command; None: it runs in this process.
    """

    name: str
    command: tuple[str, ...]
    inputs: tuple[Path, ...]
    outputs: tuple[Path, ...]
    owns: Path | None = None
    python: str | None = None

    def key(self) -> str:
        """Digest of the command and of the content of the inputs."""
        parts = [*self.command, *(f"{path.name} {digest(path)}" for path in self.inputs)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def shown(self) -> str:
        module, *arguments = self.command
        return f"python -m flacuna_jax.{module} {shlex.join(arguments)}"


@dataclasses.dataclass(frozen=True)
class Record:
    """What is known about a stage. `seconds` is the time of all starts together; `outputs` has a digest per path, and
    is empty until the stage is finished."""

    key: str
    command: str
    seconds: float
    starts: int
    version: str = __version__
    outputs: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Stopped(Exception):
    """A signal ended a stage; the same command continues the experiment."""


class Unfinished(Exception):
    """A stage has not run, and stages are only read."""


def say_at_once(line: str) -> None:
    print(line, flush=True)


def execute(stage: Stage) -> int:
    """Runs the command and returns its exit status: in this process, because imports take seconds, unless the stage
    names an interpreter."""
    module, *arguments = stage.command
    if stage.python is not None:
        return subprocess.run([stage.python, "-m", f"flacuna_jax.{module}", *arguments], check=False).returncode
    release_programs()
    return run_verb(importlib.import_module(f"flacuna_jax.{module}").main, arguments)


@dataclasses.dataclass(frozen=True)
class Stages:
    """Runs stages and keeps their records in a directory.

    Attributes:
      execute: runs a stage's command and returns its status.
      only_read: a stage that has not run is not started.
    """

    directory: Path
    say: Callable[[str], None] = say_at_once
    execute: Callable[[Stage], int] = execute
    only_read: bool = False

    def run(self, stage: Stage) -> Record:
        """Runs a stage if it has not run yet, and returns its record.

        Raises:
          UserError: the command reported an error of the user.
          Stopped: a signal ended the command.
          Unfinished: the stage has not run, and stages are only read.
          RuntimeError: any other failure.
        """
        key, known = stage.key(), self.record(stage.name)
        if known is not None and known.key == key and known.outputs and known.outputs == _digests(stage):
            self.say(f"{stage.name}: done")
            return known
        if self.only_read:
            raise Unfinished(stage.name)
        if known is None or known.key != key:
            if stage.owns is not None:
                shutil.rmtree(stage.owns, ignore_errors=True)
            known = Record(key, stage.shown(), 0.0, 0)
        self._write(stage.name, dataclasses.replace(known, starts=known.starts + 1, outputs={}))
        self.say(f"{stage.name}: {stage.shown()}")
        began = time.monotonic()
        status = self.execute(stage)
        known = dataclasses.replace(known, seconds=known.seconds + time.monotonic() - began, starts=known.starts + 1)
        self._write(stage.name, known)
        if status == EXIT_STOPPED:
            raise Stopped(f"{stage.name} was stopped; the same command continues")
        if status == EXIT_USER_ERROR:
            raise UserError(f"stage {stage.name} failed, see the message above")
        if status != EXIT_OK:
            raise RuntimeError(f"stage {stage.name} ended with status {status}")
        known = dataclasses.replace(known, outputs=_digests(stage))
        if missing := [str(path) for path in stage.outputs if str(path) not in known.outputs]:
            raise RuntimeError(f"stage {stage.name} did not write {', '.join(missing)}")
        self._write(stage.name, known)
        return known

    def records(self) -> list[Record]:
        """Records of all stages that were started."""
        return [Record(**json.loads(path.read_text("utf-8"))) for path in sorted(self.directory.glob("*.json"))]

    def record(self, name: str) -> Record | None:
        path = self._path(name)
        return Record(**json.loads(path.read_text("utf-8"))) if path.is_file() else None

    def _write(self, name: str, record: Record) -> None:
        self._path(name).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path(name), json.dumps(dataclasses.asdict(record), indent=1))

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.json"


def _digests(stage: Stage) -> dict[str, str]:
    """Digests of the outputs that exist, by path."""
    return {str(path): digest(path) for path in stage.outputs if path.exists()}


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of the files of a directory.

    Raises:
      UserError: there is no such file or directory.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return _sha256([f"{file.relative_to(path)} {digest(file)}\n".encode() for file in files])
    try:
        with path.open("rb") as file:
            return _sha256(iter(lambda: file.read(CHUNK), b""))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None


def _sha256(pieces: Iterable[bytes]) -> str:
    total = hashlib.sha256()
    for piece in pieces:
        total.update(piece)
    return total.hexdigest()
