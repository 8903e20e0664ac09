"""Stops a run on a signal: the run ends between two steps, after saving its state.

Schedulers send a signal before they reclaim a machine (Slurm: --signal=TERM@90, LSF: USR2, spot instances, Kubernetes).
A closed terminal, for example after a lost connection, sends SIGHUP to all processes that were started in it. The
process then exits with status 75 (`cli.EXIT_STOPPED`), which means neither success nor failure; the same command
continues the run.
"""

import contextlib
import functools
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import FrameType

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
OF_A_TERMINAL = (signal.SIGINT, signal.SIGHUP)
"""If these signals are already ignored (`nohup`, `&` in a script), they stay ignored."""
ECHO_SECONDS = 0.3
"""A process may receive a signal twice: from its terminal and from its launcher (`uv run`, a shell that exits)."""


class Stopped(BaseException):
    """A signal ended the run; its state, if there was any, is saved. Like KeyboardInterrupt, this is not an Exception,
    so error handlers do not catch it."""


class StopRequest:
    """Catches the signals inside a `with` block.

    Outside of `deferred`, a signal raises `Stopped` immediately, because there is nothing to save. Inside, it is only
    recorded for `poll`. The same signal a second time has its default effect and ends the process at once, except
    SIGHUP, which is then ignored.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._deferring = False
        self._pending: deque[jax.Array] = deque()

    def __enter__(self) -> "StopRequest":
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            caught = [n for n in SIGNALS if n not in OF_A_TERMINAL or signal.getsignal(n) != signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._on_signal) for number in caught}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        signal.signal(number, signal.SIG_IGN)
        if self._deferring:
            _tell(f"{signal.Signals(number).name}: saving after the current step; the same signal again exits at once")
        time.sleep(ECHO_SECONDS)
        if number != signal.SIGHUP:
            signal.signal(number, signal.SIG_DFL)
        self.received = self.received or signal.Signals(number).name
        if not self._deferring:
            raise Stopped(f"{self.received}: there was nothing to save")

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """While the block runs, signals wait for `poll`."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def poll(self) -> bool:
        """Whether to stop now. All hosts call it after every step and get the same answer.

        A single host answers at once. Several hosts exchange a number after each step and read it at the next call,
        when the computation of that step is done, so no host waits for it.
        """
        if jax.process_count() == 1:
            return self.received is not None
        self._pending.append(_any_host(self.received is not None))
        return len(self._pending) > 1 and bool(jax.device_get(self._pending.popleft()))


def _tell(text: str) -> None:
    """Writes to standard error without Python's streams: the signal may have interrupted one of their writes."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


def _any_host(flag: bool) -> jax.Array:
    """Whether `flag` is true on any host: a replicated int32, computed asynchronously."""
    spread, largest = _exchange()
    return largest(jax.make_array_from_process_local_data(spread, np.full(jax.local_device_count(), flag, np.int32)))


@functools.cache
def _exchange() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    spread, everywhere = NamedSharding(mesh, PartitionSpec("devices")), NamedSharding(mesh, PartitionSpec())
    return spread, jax.jit(jnp.max, out_shardings=everywhere)
