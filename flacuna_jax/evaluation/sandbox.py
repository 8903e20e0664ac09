"""Runs programs that a model wrote, each in a separate process that can only compute and read files.

Layers of isolation, outermost first; `isolation()` returns those that are active on this machine:

* a separate process in its own session, killed as a group at the wall-clock limit;
* an unprivileged user if we are root, and a network namespace without devices;
* limits on CPU time, memory, processes and open files, and a maximum file size of zero;
* a system call filter (seccomp) that allows only computation and reading files: no sockets, no processes or threads, no
  signals to others, and no creation, change or removal of files.

A program passes if it runs to its end: the guard then returns a secret that it received at the start. Exiting early
(`sys.exit(0)`, `os._exit(0)`) does not pass.
"""

import contextlib
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from flacuna_jax.errors import UserError

GUARD = Path(__file__).with_name("sandbox_guard.py")


@dataclass(frozen=True)
class Limits:
    """cpu_seconds limits CPU time, so programs do not fail on a busy machine; wall_seconds ends programs that wait."""

    cpu_seconds: float = 3.0
    wall_seconds: float = 12.0
    memory_bytes: int = 1 << 30


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Verdict:
    passed: bool
    reason: str
    """"passed", "timed out", or what went wrong."""


def require_permission(benchmark: str, allowed: bool) -> None:
    """Raises UserError unless the user allowed running code that a model wrote."""
    if not allowed:
        raise UserError(
            f"{benchmark} runs code that the model wrote; the code is isolated (no network, no files, no processes, "
            "limits on time and memory), but you must allow it with --allow-code-execution"
        )


@cache
def isolation() -> tuple[str, ...]:
    """The layers that are active on this machine, as reported by a process inside them."""
    return tuple(_run("", DEFAULT_LIMITS, report=True).reason.split())


def run_programs(programs: Sequence[str], limits: Limits = DEFAULT_LIMITS, workers: int = 2) -> list[Verdict]:
    """Verdicts of the programs, in order; equal programs run once."""
    unique = list(dict.fromkeys(programs))
    with ThreadPoolExecutor(workers) as pool:
        verdicts = dict(zip(unique, pool.map(lambda program: _run(program, limits), unique), strict=True))
    return [verdicts[program] for program in programs]


def _run(program: str, limits: Limits, report: bool = False) -> Verdict:
    secret = secrets.token_hex(16)
    settings = f"{secret} {limits.cpu_seconds} {limits.memory_bytes} {'report' if report else 'run'}\n"
    with tempfile.TemporaryDirectory(prefix="flacuna-sandbox-") as empty, tempfile.TemporaryFile() as stdin:
        Path(empty).chmod(0o755)
        # surrogatepass: a model can write any string, and invalid text must fail in the sandbox, not here.
        stdin.write((settings + program).encode("utf-8", "surrogatepass"))
        stdin.seek(0)
        process = subprocess.Popen(
            # -I: nothing from the environment or the user's site; -S: no site-packages; -B: no bytecode files.
            [sys.executable, "-I", "-S", "-B", str(GUARD)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=empty,
            env={"PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        with process:
            try:
                output = _read(process, limits.wall_seconds)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    if output is None:
        return Verdict(False, "timed out")
    answer = output.decode("utf-8", "replace")
    if report:
        return Verdict(True, answer)
    if answer.startswith(secret):
        return Verdict(True, "passed")
    if process.returncode in (-24, -9):  # SIGXCPU at the soft limit, SIGKILL at the hard one
        return Verdict(False, "timed out")
    if process.returncode < 0:
        return Verdict(False, f"killed by signal {-process.returncode}")
    return Verdict(False, f"failed: {answer[:500]}" if answer else "left before the end")


def _read(process: subprocess.Popen, seconds: float) -> bytes | None:
    """Output of the process until it closes its output, at most 64 KiB; None if that takes more than `seconds`."""
    assert process.stdout is not None
    descriptor, deadline, output = process.stdout.fileno(), time.monotonic() + seconds, b""
    while len(output) < 1 << 16:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            return None
        piece = os.read(descriptor, 1 << 16)
        if not piece:
            # The output is closed: the program has ended, or has closed it itself and may run forever.
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                return None
            return output
        output += piece
    return output
