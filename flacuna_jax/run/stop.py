"""Being asked to stop: a signal ends a run between two steps, with its state saved.

Schedulers send one before they take a machine away (Slurm: --signal=TERM@90, LSF: USR2, spot instances, Kubernetes); a
terminal that is closed, as by a lost connection, sends SIGHUP to all that was started in it. The process then leaves
with status 75 (`cli.EXIT_STOPPED`), which neither success nor failure uses: start the same command again and it
continues.
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
"""Ignored by who was started so (`nohup`, `&` in a script), they stay ignored."""
ECHO_SECONDS = 0.3
"""A signal reaches a process twice where both its terminal and its launcher send it (`uv run`, a shell that ends)."""


class Stopped(BaseException):
    """A signal asked the run to end; what there was to save is saved. Like KeyboardInterrupt, it is no error that
    anything on the way should handle."""


class StopRequest:
    """Catches the signals inside a `with` block.

    Outside of `deferred` a signal raises `Stopped` where the program is: nothing is at stake yet. Inside it is only
    noted, for `poll`. The same signal a second time has its default effect, which ends the process at once.
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
            _tell(f"{signal.Signals(number).name}: saving after the step at work; the same again ends the run at once")
        time.sleep(ECHO_SECONDS)
        if number != signal.SIGHUP:
            signal.signal(number, signal.SIG_DFL)
        self.received = self.received or signal.Signals(number).name
        if not self._deferring:
            raise Stopped(f"{self.received}: nothing was under way that had to be saved")

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """While the block runs, signals wait for `poll`."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def poll(self) -> bool:
        """Whether to stop now; called by all hosts after every step, and the same answer on all of them.

        One host knows at once. Several exchange a number behind each step, and read it one call later, when the step
        it followed is done: nobody waits for it.
        """
        if jax.process_count() == 1:
            return self.received is not None
        self._pending.append(_any_host(self.received is not None))
        return len(self._pending) > 1 and bool(jax.device_get(self._pending.popleft()))


def _tell(text: str) -> None:
    """On standard error, past Python's streams: these may be in the middle of a write that the signal interrupted."""
    with contextlib.suppress(OSError):
        os.write(2, f"\n{text}\n".encode())


def _any_host(flag: bool) -> jax.Array:
    """Whether any host says so: a replicated int32 that is computed while the caller goes on."""
    spread, largest = _exchange()
    return largest(jax.make_array_from_process_local_data(spread, np.full(jax.local_device_count(), flag, np.int32)))


@functools.cache
def _exchange() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    mesh = Mesh(np.array(jax.devices()), ("devices",))
    spread, everywhere = NamedSharding(mesh, PartitionSpec("devices")), NamedSharding(mesh, PartitionSpec())
    return spread, jax.jit(jnp.max, out_shardings=everywhere)
