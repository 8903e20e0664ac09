"""Runs jobs whose results are files, on any number of processes; a job whose result is there already is not run again.

So a build that was killed continues where it was. Results are written beside their place and then moved to it: what is
there is whole. A job must be a function of its arguments alone.
"""

import json
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from flacuna_jax.whole_files import replacing

Arrays = Mapping[str, NDArray[Any]]
WRITTEN: Mapping[str, type[np.generic]] = MappingProxyType(
    {
        "record_keys": np.uint64,
        "part": np.int32,
        "length": np.int32,
        "supervised": np.int32,
        "traits": np.int32,
        "text": np.uint64,
    }
)
"""Columns of the records that a job has written."""


@dataclass(frozen=True)
class Result:
    """What a job leaves: arrays, and a JSON value."""

    arrays: Arrays
    facts: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """`function(*arguments)` gives the Result that is kept at `path` (.npz)."""

    path: Path
    function: Callable[..., Result]
    arguments: tuple[Any, ...]


class Crew:
    """Processes that run jobs; they start with the first jobs that are worth it and live until the crew is closed."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, jobs: Sequence[Job]) -> int:
        """Runs the jobs whose result is missing, and returns how many had theirs already.

        The first exception of a job is raised here.
        """
        missing = [job for job in jobs if not job.path.exists()]
        if self._workers == 1 or len(missing) < 2:
            for job in missing:
                _run(job)
        else:
            if self._pool is None:
                # Fresh processes: a fork would take over threads that libraries of the parent may have started.
                self._pool = ProcessPoolExecutor(self._workers, mp_context=multiprocessing.get_context("spawn"))
            for future in [self._pool.submit(_run, job) for job in missing]:
                future.result()
        return len(jobs) - len(missing)


def _run(job: Job) -> None:
    save_result(job.path, job.function(*job.arguments))


def save_result(path: Path, result: Result) -> None:
    facts = np.frombuffer(json.dumps(result.facts).encode(), np.uint8)
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, allow_pickle=False, __facts__=facts, **dict(result.arrays))


def load_result(path: Path) -> Result:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return Result(arrays, json.loads(arrays.pop("__facts__").tobytes()))


@contextmanager
def writing(path: Path) -> Iterator[TextIO]:
    """A text file that appears at `path` when it is whole and on the disk."""
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as file:
        yield file
