"""The process in which a program of a model runs: it isolates itself, then runs the program from stdin.

`sandbox.py` starts it as a script that can import only the standard library. Protocol: the first line of stdin is
"secret cpu_seconds memory_bytes run|report", the rest is the program; stdout is the secret if the program ran to its
end, otherwise the error.
"""

import contextlib
import ctypes
import importlib
import math
import os
import platform
import resource
import struct
import sys
from pathlib import Path

NOBODY = 65534
CLONE_NEWNET, CLONE_NEWUSER = 0x40000000, 0x10000000
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
ALLOW, REFUSE, MISSING = 0x7FFF0000, 0x00050000 | 1, 0x00050000 | 38  # EPERM, ENOSYS
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

IMPORTED = (
    "abc array base64 bisect calendar cmath collections.abc contextlib copy dataclasses datetime decimal enum "
    "fractions functools hashlib heapq inspect io itertools json locale math numbers operator queue random re "
    "secrets statistics string struct textwrap time traceback types typing unicodedata unittest uuid zlib _strptime "
    "ast threading"
)

# The numbers of system calls are part of the kernel's ABI and never change, so the filter needs only Python and Linux.
# pyseccomp needs the system's libseccomp, and bubblewrap must be installed and needs user namespaces, which containers
# and clusters often forbid.
# Audit architecture, the calls that Python needs for computation, the number of openat, of open if it exists, and of
# clone3.
CALLS = {
    "x86_64": (
        0xC000003E,
        # read write close stat fstat lstat poll lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn
        # ioctl pread64 readv writev access select sched_yield mremap madvise dup nanosleep getpid exit uname getcwd
        # readlink gettimeofday getrlimit getrusage times getuid getgid geteuid getegid getppid sigaltstack gettid time
        # futex getdents64 clock_gettime clock_getres clock_nanosleep exit_group newfstatat readlinkat pselect6 ppoll
        # set_robust_list dup3 getrandom statx rseq faccessat faccessat2 sched_getaffinity
        "0 1 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 19 20 21 23 24 25 28 32 35 39 60 63 79 89 96 97 98 100 102 104 107 "
        "108 110 131 186 201 202 217 228 229 230 231 262 267 270 271 273 292 318 332 334 269 439 204",
        257,
        2,
        435,
    ),
    "aarch64": (
        0xC00000B7,
        "17 23 24 29 48 61 62 63 64 65 66 67 72 73 78 79 80 93 94 98 99 101 113 114 115 123 124 132 134 135 139 153 "
        "160 163 165 169 172 173 174 175 176 177 178 214 215 216 222 226 233 278 291 293 439 57",
        56,
        None,
        435,
    ),
}


def seccomp_program(machine: str) -> bytes:
    """Classic BPF program: allows the listed calls, `open` and `openat` for reading only, and refuses all others."""
    arch, numbers, openat, open_, clone3 = CALLS[machine]
    load, jump_eq, jump_set, give = 0x20, 0x15, 0x45, 0x06
    code: list[tuple[int, int, int, int]] = [
        (load, 0, 0, 4),  # architecture
        (jump_eq, 1, 0, arch),
        (give, 0, 0, REFUSE),
        (load, 0, 0, 0),  # number of the call
    ]
    for number in map(int, numbers.split()):
        code += [(jump_eq, 0, 1, number), (give, 0, 0, ALLOW)]
    # glibc tries clone3 first and falls back to clone if it is missing; clone is then refused with EPERM.
    code += [(jump_eq, 0, 1, clone3), (give, 0, 0, MISSING)]
    for opening, flags_argument in ((openat, 2), (open_, 1)):
        if opening is not None:
            offset = 16 + 8 * flags_argument
            code += [
                (jump_eq, 0, 4, opening),
                (load, 0, 0, offset),
                (jump_set, 0, 1, WRITING),
                (give, 0, 0, REFUSE),
                (give, 0, 0, ALLOW),
            ]
    code.append((give, 0, 0, REFUSE))
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)


def others_can_read(path: Path) -> bool:
    return bool(path.stat().st_mode & 0o004) and all(parent.stat().st_mode & 0o001 for parent in path.parents)


def lock_up(cpu_seconds: float, memory_bytes: int) -> list[str]:
    """Applies all available layers and returns their names."""
    layers = ["process"]
    libc = ctypes.CDLL(None, use_errno=True)
    is_linux = sys.platform == "linux"
    if is_linux:
        is_root = os.geteuid() == 0
        if libc.unshare(CLONE_NEWNET if is_root else CLONE_NEWUSER | CLONE_NEWNET) == 0:
            layers.append("network-namespace")
        if is_root:
            with contextlib.suppress(OSError):
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
                layers.append("unprivileged-user")
        else:
            layers.append("unprivileged-user")
    cpu = max(1, math.ceil(cpu_seconds))
    limits = {
        "RLIMIT_CPU": (cpu, cpu + 1),
        "RLIMIT_AS": (memory_bytes, memory_bytes),
        "RLIMIT_NPROC": (0, 0),
        "RLIMIT_NOFILE": (32, 32),
        "RLIMIT_FSIZE": (0, 0),
        "RLIMIT_CORE": (0, 0),
        "RLIMIT_STACK": (64 << 20, 64 << 20),
    }
    for name, limit in limits.items():
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(getattr(resource, name), limit)
    layers.append("limits")
    if is_linux and platform.machine() in CALLS and libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0:
        program = seccomp_program(platform.machine())
        buffer = ctypes.create_string_buffer(program, len(program))
        header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
        if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.create_string_buffer(header, len(header)), 0, 0) == 0:
            layers.append("system-call-filter")
    return layers


def main() -> None:
    settings, _, program = sys.stdin.buffer.read().decode("utf-8", "surrogatepass").partition("\n")
    secret, cpu_seconds, memory_bytes, mode = settings.split()
    answer = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(null, descriptor)
    os.closerange(answer + 1, 64)
    if not others_can_read(Path(os.__file__)):
        # The unprivileged user cannot read the standard library, so import common modules now.
        for name in IMPORTED.split():
            importlib.import_module(name)
    layers = lock_up(float(cpu_seconds), int(memory_bytes))
    if mode == "report":
        os.write(answer, " ".join(layers).encode())
        return
    try:
        # Without a __name__, as in HumanEval's own harness, so `if __name__ == "__main__"` is false in programs.
        exec(compile(program, "<program>", "exec"), {})
        outcome = secret
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"
    os.write(answer, outcome.encode("utf-8", "replace"))
    os._exit(0)


if __name__ == "__main__":
    main()
