"""Runs jobs whose results are files, on any number of processes; a job whose result exists is not run again.

So a killed build continues where it stopped. Results are written to temporary files and then renamed, so an existing
result is complete. A job must depend only on its arguments.
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
"""Columns of the records written by a job."""


@dataclass(frozen=True)
class Result:
    """The result of a job: arrays, and a JSON value."""

    arrays: Arrays
    facts: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """`function(*arguments)` returns the Result, which is stored at `path` (.npz)."""

    path: Path
    function: Callable[..., Result]
    arguments: tuple[Any, ...]


class Crew:
    """Processes that run jobs; they start with the first jobs that need them, and end when the crew is closed."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, jobs: Sequence[Job]) -> int:
        """Runs the jobs without a result, and returns the number of jobs that already had one.

        The first exception of a job is raised here.
        """
        missing = [job for job in jobs if not job.path.exists()]
        if self._workers == 1 or len(missing) < 2:
            for job in missing:
                _run(job)
        else:
            if self._pool is None:
                # Spawned, because a fork would inherit threads that libraries of the parent may have started.
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
