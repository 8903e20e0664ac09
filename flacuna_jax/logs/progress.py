"""Progress of a run on the screen: a live bar in a terminal, otherwise a line per logged step."""

import contextlib
import datetime
import sys
import time
from collections.abc import Callable, Iterator
from typing import Protocol, TextIO

import rich.progress
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from flacuna_jax.logs.metrics import TrainRecord

COMPILING = "compiling"
"""Label of the bar until the first step is done."""


class Progress(Protocol):
    def advance(self, step: int) -> None:
        """Called after every step with the number of steps done."""

    def show(self, record: TrainRecord) -> None:
        """Shows a logged step; called when its results are on the host."""

    def say(self, text: str) -> None:
        """Prints a permanent line."""

    def doing(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Shows, in a terminal, an activity other than training while the block runs."""


@contextlib.contextmanager
def open_progress(
    total_steps: int, done_steps: int = 0, *, file: TextIO | None = None, primary: bool = True
) -> Iterator[Progress]:
    """Progress on `file` (stdout): live if it is a terminal, plain lines if not, nothing on hosts other than the first.

    Args:
      total_steps: optimizer steps of the whole run.
      done_steps: steps already done, in a resumed run.
    """
    console = Console(file=file, highlight=False)
    if not primary:
        yield Silent()
    elif console.is_terminal:
        with Live(console=console, refresh_per_second=4) as live:
            yield LiveBar(live, total_steps, done_steps)
    else:
        yield PlainLines(file or sys.stdout, total_steps)


class Eta:
    """Estimates the time left from the pace since the first logged step, which excludes compilation."""

    def __init__(self, total_steps: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self._total_steps = total_steps
        self._clock = clock
        self._first: tuple[int, float] | None = None

    def after(self, step: int) -> str:
        """Time left as `h:mm:ss`; `-:--:--` before a second step was logged."""
        now = self._clock()
        self._first = self._first or (step, now)
        first_step, first_time = self._first
        if step == first_step:
            return "0:00:00" if step == self._total_steps else "-:--:--"
        seconds = (now - first_time) / (step - first_step) * (self._total_steps - step)
        return str(datetime.timedelta(seconds=round(seconds)))


class PlainLines:
    def __init__(self, file: TextIO, total_steps: int) -> None:
        self._file = file
        self._total_steps = total_steps
        self._eta = Eta(total_steps)

    def advance(self, step: int) -> None:
        pass

    def show(self, record: TrainRecord) -> None:
        width = len(str(self._total_steps))
        where = f"step {record.step:>{width}}/{self._total_steps}"
        self.say("  ".join((where, *_figures(record), f"ETA {self._eta.after(record.step)}")))

    def say(self, text: str) -> None:
        print(text, file=self._file, flush=True)

    def doing(self, what: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class LiveBar:
    def __init__(self, live: Live, total_steps: int, done_steps: int) -> None:
        self._live = live
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("{task.description:<10}"),
            rich.progress.BarColumn(bar_width=None),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TaskProgressColumn(),
            rich.progress.TextColumn("ETA {task.fields[eta]}"),
            expand=True,
        )
        self._task = self._bar.add_task(COMPILING, total=total_steps, completed=done_steps, eta="-:--:--")
        self._eta = Eta(total_steps)
        live.update(self._bar)

    def advance(self, step: int) -> None:
        self._bar.update(self._task, completed=step, description="training")

    def show(self, record: TrainRecord) -> None:
        self._bar.update(self._task, completed=record.step, eta=self._eta.after(record.step))
        self._live.update(Group(self._bar, Text("  ".join(_figures(record)), style="cyan")))

    def say(self, text: str) -> None:
        self._live.console.print(Text(text))

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        before = self._bar.tasks[0].description
        self._bar.update(self._task, description=what)
        self._live.refresh()
        yield
        self._bar.update(self._task, description=before)
        self._live.refresh()


class Silent:
    def advance(self, step: int) -> None:
        pass

    def show(self, record: TrainRecord) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def doing(self, what: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def _figures(record: TrainRecord) -> list[str]:
    mean = "" if record.mean_loss is None else f" (mean {record.mean_loss:.4f})"
    figures = [f"loss {record.loss:.4f}{mean}", f"lr {record.learning_rate:.2e}", f"grad norm {record.grad_norm:.3f}"]
    if record.supervised_tokens_per_second is not None:
        figures.append(f"{record.supervised_tokens_per_second:,.0f} supervised tok/s")
    figures.append(f"fill {100 * record.fill:.1f} %")
    if record.mfu is not None:
        figures.append(f"MFU {100 * record.mfu:.1f} %")
    if record.peak_memory_bytes is not None:
        figures.append(f"memory {record.peak_memory_bytes / 2**30:.1f} GiB")
    if record.skipped:
        figures.append(f"skipped {record.skipped}")
    return figures
