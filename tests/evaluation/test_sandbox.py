"""Permitted and forbidden operations of programs of a model; each escape is tried separately."""

import os
import time
from pathlib import Path

import pytest

from flacuna_jax.errors import UserError
from flacuna_jax.evaluation import sandbox
from flacuna_jax.evaluation.sandbox import Limits, isolation, require_permission, run_programs

QUICK = Limits(cpu_seconds=1.0, wall_seconds=3.0, memory_bytes=1 << 29)


def _run(program: str, limits: Limits = QUICK) -> sandbox.Verdict:
    return run_programs([program], limits)[0]


def test_runs_ordinary_programs() -> None:
    modules = "math, collections, hashlib, re, typing, heapq, statistics"
    program = f"import {modules}\nassert math.gcd(6, 4) == 2\nprint('x' * 10**6)"
    assert _run(program) == sandbox.Verdict(True, "passed")
    assert _run("assert 1 == 2, 'no'") == sandbox.Verdict(False, "failed: AssertionError: no")
    assert _run("def (").reason.startswith("failed: SyntaxError")


def test_a_main_block_is_not_run() -> None:
    """As in HumanEval's own harness, programs have no __name__; their main block could ask for input."""
    assert _run("if __name__ == '__main__':\n    raise ValueError(input())").passed


def test_layers_are_reported() -> None:
    assert {"process", "limits"} <= set(isolation())


needs_filter = pytest.mark.skipif(
    "system-call-filter" not in isolation(), reason="this machine's kernel or processor has no system call filter here"
)

BEFORE_THE_END = [
    "import os; os._exit(0)",
    "import sys; sys.exit(0)",
    "raise SystemExit",
    "import os; os.close(3); os._exit(0)",
    "import os; os.write(3, b'0' * 32)\nos._exit(0)",
]


@pytest.mark.parametrize("program", BEFORE_THE_END)
def test_exiting_early_does_not_pass(program: str) -> None:
    assert not _run(program).passed


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except Exception: pass\n"
        "while True: pass",
        "import os, time; os.close(3); time.sleep(60)",
    ],
)
def test_endless_programs_are_ended(program: str) -> None:
    begin = time.monotonic()
    verdict = _run(program)
    assert (verdict.passed, verdict.reason) == (False, "timed out")
    assert time.monotonic() - begin < 10


def test_memory_is_limited() -> None:
    assert "MemoryError" in _run("x = bytearray(1 << 30)").reason
    assert not _run("x = []\nwhile True: x.append(' ' * 10**7)", Limits(5, 10, 1 << 29)).passed


def test_endless_output_is_not_collected() -> None:
    assert not _run("import os\nwhile True: os.write(3, b'x' * 65536)").passed


@needs_filter
@pytest.mark.parametrize(
    "attempt",
    [
        "import os\nwhile True: os.fork()",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import os; os.execv('/bin/true', ['true'])",
        "import threading; threading.Thread(target=print).start()",
        "import _socket; _socket.socket()",
        "import os; os.kill(os.getppid(), 9)",
        "import os; os.kill(-1, 9)",
        "import os; os.killpg(0, 9)",
        "import os; os.setuid(0)",
        "import os; os.mkdir('/tmp/escaped')",
        "import os; os.chmod('.', 0o777)",
        "import os; os.symlink('/etc/passwd', 'x')",
        "open('escaped', 'w')",
        "open('/dev/shm/escaped', 'w')",
        "open('/proc/self/mem', 'r+b')",
        "import ctypes\nassert ctypes.CDLL(None, use_errno=True).syscall(425, 8, 0) >= 0",  # io_uring_setup
        "import ctypes\nassert ctypes.CDLL(None, use_errno=True).ptrace(0, 0, 0, 0) == 0",
        "import ctypes\nassert ctypes.CDLL(None, use_errno=True).unshare(0x10000000) == 0",
    ],
)
def test_escapes_are_refused(attempt: str) -> None:
    verdict = _run(attempt)
    assert not verdict.passed
    assert "timed out" not in verdict.reason


@needs_filter
def test_nothing_outside_is_changed(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    victim = tmp_path / "victim"
    victim.write_text("whole")
    victim.chmod(0o666)
    for attempt in (
        "open(%r, 'w')",
        "import os; os.remove(%r)",
        "import os; os.truncate(%r, 0)",
        "import os; os.rename(%r, 'x')",
    ):
        assert "PermissionError" in _run(attempt % str(victim)).reason
    assert victim.read_text() == "whole"


def test_no_process_remains() -> None:
    _run("import time; time.sleep(60)")
    running = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if os.access(path, os.R_OK)]
    assert not [line for line in running if b"sandbox_guard" in line]


def test_running_code_needs_permission() -> None:
    require_permission("humaneval", True)
    with pytest.raises(UserError, match=r"humaneval runs code .* --allow-code-execution"):
        require_permission("humaneval", False)
