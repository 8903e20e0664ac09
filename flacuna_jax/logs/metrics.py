"""Metrics of a run: the record of a logged step, its rates, and the trackers that receive records.

metrics.jsonl is the primary record; TensorBoard and Weights & Biases get the same numbers through the same interface.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import socket
import struct
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax

from flacuna_jax.config.run import LoggingConfig
from flacuna_jax.errors import UserError

TENSORBOARD = "tensorboard"
_EVENT_FILE = re.compile(r"events\.out\.tfevents\.(\d+)\.")
WANDB = "wandb"

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class TrainRecord:
    """One logged optimizer step. Counts refer to this step; rates are means since the previous record."""

    step: int
    """1-based: number of batches so far, including this one."""
    epoch: int
    """0-based."""
    loss: float
    """Mean over the step's supervised tokens, before its update."""
    mean_loss: float | None
    """Mean of `loss` over the last steps, at most `RECENT_STEPS`, without bad steps; null if all were bad."""
    grad_norm: float
    """Global norm before clipping."""
    learning_rate: float
    """Learning rate of this update."""
    examples: int
    rows: int
    """Packed rows with at least one token."""
    tokens: int
    """Without padding."""
    supervised_tokens: int
    fill: float
    """tokens / (rows × max_length)."""
    tokens_per_second: float | None = None
    """Null until a step after the first one, which compiles, is finished."""
    supervised_tokens_per_second: float | None = None
    seconds_per_step: float | None = None
    mfu: float | None = None
    """Model FLOP/s (training/flops.py) as a fraction of the devices' dense peak; null if the peak is not known."""
    peak_memory_bytes: int | None = None
    """Maximum over the local devices; null if the backend has no statistics."""
    skipped: int = 0
    """Number of bad steps so far, which changed nothing."""
    scalars: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Scalars of the objective, logged under their names like the other fields."""

    def to_json(self) -> dict[str, Any]:
        record = dataclasses.asdict(self)
        return record | record.pop("scalars")

    @classmethod
    def names(cls) -> frozenset[str]:
        """Names that every run logs."""
        return frozenset(field.name for field in dataclasses.fields(cls)) - {"scalars"}


@dataclasses.dataclass(frozen=True)
class Rates:
    """Means over several steps; all null without steps."""

    tokens_per_second: float | None = None
    supervised_tokens_per_second: float | None = None
    seconds_per_step: float | None = None
    flops_per_second: float | None = None


class Throughput:
    """Rates between log points, by wall time.

    Steps run asynchronously, so `start` and `lap` are called when the results of the last added step are on the host.
    `start` is called once, after the first step, so rates do not include compilation.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._since: float | None = None
        self._paused_at: float | None = None
        self._steps = self._tokens = self._supervised_tokens = 0
        self._flops = 0.0

    def start(self) -> None:
        self._since = self._clock()
        self._steps = self._tokens = self._supervised_tokens = 0
        self._flops = 0.0

    def add(self, tokens: int, supervised_tokens: int, flops: float = 0.0) -> None:
        """Counts one step; steps before `start` are ignored."""
        self._steps += 1
        self._tokens += tokens
        self._supervised_tokens += supervised_tokens
        self._flops += flops

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time spent in the block: checkpoints, evaluation."""
        self.pause()
        yield
        self.resume()

    def pause(self) -> None:
        """Excludes the time from now to `resume`."""
        self._paused_at = self._clock()

    def resume(self) -> None:
        if self._since is not None and self._paused_at is not None:
            self._since += self._clock() - self._paused_at
        self._paused_at = None

    def lap(self) -> Rates:
        """Rates since `start` or the previous lap."""
        if self._since is None or not self._steps:
            return Rates()
        seconds = self._clock() - self._since
        rates = Rates(
            self._tokens / seconds, self._supervised_tokens / seconds, seconds / self._steps, self._flops / seconds
        )
        self.start()
        return rates


def peak_memory_bytes() -> int | None:
    """Maximum over local devices of the peak bytes in use; None if the backend has no statistics (CPU)."""
    statistics = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [found["peak_bytes_in_use"] for found in statistics if "peak_bytes_in_use" in found]
    return max(peaks, default=None)


class Tracker(Protocol):
    """Receives records. A record is a flat mapping; `step` is its step in the run."""

    def log(self, record: Record) -> None: ...

    def sync(self) -> None:
        """Returns once all logged records are on disk; called before a checkpoint is saved."""

    def close(self) -> None: ...


@contextlib.contextmanager
def open_tracker(
    logging: LoggingConfig, run_dir: Path, *, config: Record, after_step: int, primary: bool = True
) -> Iterator[Tracker]:
    """Opens the trackers that the settings enable as one tracker, and closes them after the block.

    Args:
      logging: settings that enable trackers.
      run_dir: an existing run directory whose metrics.jsonl is already truncated to `after_step`.
      config: the resolved config, shown by Weights & Biases.
      after_step: 0, or the step of the checkpoint from which the run resumes. Earlier records of later steps are
        superseded.
      primary: whether this host writes; the other hosts of a multi-host run log nothing.

    Raises:
      UserError: metrics.jsonl cannot be written, or Weights & Biases is enabled and not installed or not usable.
    """
    with contextlib.ExitStack() as stack:
        trackers: list[Tracker] = []

        def add(tracker: Tracker) -> None:
            stack.callback(_close, tracker)
            trackers.append(tracker)

        if primary:
            add(JsonLines(run_dir / "metrics.jsonl"))
            if logging.tensorboard:
                try:
                    add(TensorBoard(run_dir / TENSORBOARD, after_step))
                except OSError as error:
                    print(f"warning: TensorBoard is disabled: {error}")
            if logging.wandb is not None:
                add(WeightsAndBiases(logging.wandb, run_dir, config))
        yield Several(trackers)


class Several:
    """Forwards all calls to several trackers, except `close`; the caller that opened the trackers closes them.

    metrics.jsonl comes first, and an error in writing it ends the run. Any other tracker that fails is disabled with a
    warning, because an unavailable dashboard should not end a run.
    """

    def __init__(self, trackers: list[Tracker], say: Callable[[str], None] = print) -> None:
        self._trackers = trackers
        self._say = say

    def log(self, record: Record) -> None:
        self._each(lambda tracker: tracker.log(record))

    def sync(self) -> None:
        self._each(lambda tracker: tracker.sync())

    def close(self) -> None:
        pass

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except Exception as error:
                if isinstance(tracker, JsonLines):
                    raise
                self._trackers.remove(tracker)
                self._say(f"warning: {type(tracker).__name__} is disabled from now on: {error}")


class JsonLines:
    """Writes a JSON object per line, each with one write call. Numbers that are not finite become null."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._writing():
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def log(self, record: Record) -> None:
        values = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        line = json.dumps(values, allow_nan=False, ensure_ascii=False).encode() + b"\n"
        with self._writing():
            while line:
                line = line[os.write(self._descriptor, line) :]
            self._require_present()

    @classmethod
    def append(cls, path: Path, record: Record) -> None:
        """Opens the file, appends one line and closes it; for files that are seldom written."""
        with contextlib.closing(cls(path)) as lines:
            lines.log(record)

    def sync(self) -> None:
        with self._writing():
            os.fsync(self._descriptor)
            self._require_present()

    def close(self) -> None:
        os.close(self._descriptor)

    def _require_present(self) -> None:
        """Raises UserError if the file was deleted or moved: writes would still succeed, but to another file."""
        if not (self._path.exists() and os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))):
            raise UserError(f"{self._path} is gone: its directory was removed, moved or unmounted during the run")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self._path} cannot be written: {error.strerror}") from None


class TensorBoard:
    """Writes scalars to event files. A resumed run starts with an event that hides records after its checkpoint.

    This does not use the writer of tensorboardX, which processes a queue in a thread: if the disk is full, the thread
    dies, and waiting for the queue blocks forever.
    """

    def __init__(self, directory: Path, after_step: int) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._event = Event
        directory.mkdir(exist_ok=True)
        # TensorBoard reads files in the order of the seconds in their names. A quick restart, or a clock that was set
        # back, must not change that order.
        earlier = (_EVENT_FILE.match(path.name) for path in directory.iterdir())
        second = max([int(time.time()), *(int(found[1]) + 1 for found in earlier if found)])
        self._file = (directory / f"events.out.tfevents.{second:010}.{socket.gethostname()}").open("xb")
        self._write(file_version="brain.Event:2")
        self._write(step=after_step + 1, session_log=SessionLog(status=SessionLog.START))

    def log(self, record: Record) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        values = [
            Summary.Value(tag=name if "/" in name else f"train/{name}", simple_value=value)
            for name, value in _scalars(record).items()
        ]
        if values:
            self._write(step=record["step"], summary=Summary(value=values))

    def sync(self) -> None:
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _write(self, **event: Any) -> None:
        """Writes a record in the format of TensorFlow: length and content, each followed by its checksum."""
        from tensorboardX.record_writer import masked_crc32c

        content = self._event(wall_time=time.time(), **event).SerializeToString()
        length = struct.pack("<Q", len(content))
        for part in (length, content):
            self._file.write(part + struct.pack("<I", masked_crc32c(part)))
        self._file.flush()


class WeightsAndBiases:
    """One W&B run for all starts of a run directory; works offline with WANDB_MODE=offline."""

    def __init__(self, project: str, run_dir: Path, config: Record) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError(
                f"logging.wandb is {project!r} but the wandb package is not installed: "
                "pip install 'flacuna-jax[wandb]', or set logging.wandb: null"
            ) from None
        settings: dict[str, Any] = {
            "project": project,
            "dir": str(run_dir),
            "name": run_dir.name,
            "id": _kept_id(run_dir / WANDB / "flacuna_run_id"),
            "resume": "allow",
            "config": dict(config),
        }
        try:
            self._run = wandb.init(**settings)
        except wandb.errors.CommError as error:  # no network: records are kept for a later `wandb sync`
            print(f"warning: logging.wandb: {error}; logging offline to {run_dir / WANDB}")
            wandb.teardown()  # its service still has the run of the first attempt
            self._run = wandb.init(**settings, mode="offline")
        except wandb.Error as error:
            raise UserError(
                f"logging.wandb: {error}; WANDB_MODE=offline logs without a network, logging.wandb: null disables it"
            ) from None

    def log(self, record: Record) -> None:
        self._run.log(_scalars(record), step=record["step"])

    def sync(self) -> None:
        pass  # The wandb process uploads, and keeps a journal on disk.

    def close(self) -> None:
        self._run.finish()


def _close(tracker: Tracker) -> None:
    try:
        tracker.close()
    except Exception as error:
        print(f"warning: {type(tracker).__name__} could not be closed: {error}")


def _scalars(record: Record) -> dict[str, float]:
    """The scalars of a record; empty if the record has no step."""
    if "step" not in record:
        return {}
    return {
        name: value
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
    }


def _kept_id(path: Path) -> str:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text().strip()
