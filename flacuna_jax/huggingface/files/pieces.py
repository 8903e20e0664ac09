"""Writes and verifies files in pieces with several threads, so that values are computed while others are written.

A file's digest is the SHA-256 of its size and of the CRC-32s of its pieces. It detects damage by disks and copies, not
by an adversary. Checksums of pieces are computed in parallel, several times as fast as a hash of the whole file.

Written data go to the disk at once and leave the page cache, so a file that is read back comes from the disk. This is
also faster, because freed pages are used again, instead of filling the memory.
"""

import errno
import hashlib
import os
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.files.tensors import as_bytes, forget

PIECE_BYTES = 1 << 24
_STRIDE = 1 << 20
"""Bytes that are read back and summed at a time; they fit the cache of a core."""
_MOST_PARTS = 512
"""Maximum number of buffers in one call; the limit of Linux is 1024."""
THREADS = max(2, min(8, os.cpu_count() or 1))
_AHEAD = 2 * THREADS
_ON_THEIR_WAY = 16 * PIECE_BYTES
"""Written bytes that may still be on their way to the disk; older ones are dropped from the page cache."""

Maker = Callable[[], np.ndarray]
"""Computes the next values of a file, in one of several threads."""


def write_pieces(path: Path, size: int, makers: Iterable[Maker]) -> str:
    """Writes a file of `size` bytes from arrays that are computed a few ahead of the writing, and returns its digest.

    When this returns, the file is on the disk and no longer in the page cache.

    Args:
      path: file to create.
      size: total size in bytes; this space is allocated first, so that a full disk is detected at once.
      makers: compute the arrays in file order.

    Raises:
      UserError: the disk is full or cannot be written to; also any exception of the makers.
    """
    try:
        # One thread writes: two threads would wait for each other in the kernel, and keep a core busy.
        with path.open("wb", buffering=0) as file, ThreadPoolExecutor(THREADS) as pool, ThreadPoolExecutor(1) as writer:
            _allocate(file.fileno(), size)
            writing: deque[Future[None]] = deque()
            sums: list[Future[int]] = []
            position = 0
            for parts in _cut(as_bytes(array) for array in _ahead(pool, makers)):
                sums.append(pool.submit(_sum_of, parts))
                writing.append(writer.submit(_store, file.fileno(), position, parts))
                position += sum(map(len, parts))
                if len(writing) > _AHEAD:
                    writing.popleft().result()
            for job in writing:
                job.result()
            os.fsync(file.fileno())
            forget(file.fileno())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    assert position == size, f"{path}: {position} bytes instead of {size}"
    return _digest(size, [job.result() for job in sums])


def file_digest(path: Path) -> str:
    """Digest of a file that `write_pieces` wrote, read from the disk.

    Raises:
      UserError: it cannot be read.
    """
    try:
        with path.open("rb", buffering=0) as file, ThreadPoolExecutor(THREADS) as pool:
            size = os.fstat(file.fileno()).st_size
            starts = range(0, size, PIECE_BYTES)
            return _digest(size, list(pool.map(lambda start: _sum(file.fileno(), start), starts)))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _allocate(descriptor: int, size: int) -> None:
    """Allocates the whole file at once, which is several times as fast as growing it, and fails early on a full
    disk."""
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise


def _ahead(pool: ThreadPoolExecutor, makers: Iterable[Maker]) -> Iterator[np.ndarray]:
    waiting: deque[Future[np.ndarray]] = deque()
    for make in makers:
        waiting.append(pool.submit(make))
        if len(waiting) > _AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _cut(views: Iterable[memoryview]) -> Iterator[list[memoryview]]:
    """Groups the bytes into lists, one for each piece."""
    parts: list[memoryview] = []
    room = PIECE_BYTES
    for view in views:
        while len(view):
            part, view = view[:room], view[room:]
            parts.append(part)
            room -= len(part)
            if not room:
                yield parts
                parts, room = [], PIECE_BYTES
    if parts:
        yield parts


def _sum_of(parts: Sequence[memoryview]) -> int:
    """CRC-32 of a piece."""
    total = 0
    for part in parts:
        total = zlib.crc32(part, total)
    return total


def _store(descriptor: int, position: int, parts: Sequence[memoryview]) -> None:
    """Writes a piece at its position: in one call if the system permits, between page boundaries."""
    waiting = deque(parts)
    start, size = position, sum(map(len, parts))
    while waiting:
        written = os.pwritev(descriptor, list(waiting)[:_MOST_PARTS], position)
        position += written
        while waiting and written >= len(waiting[0]):
            written -= len(waiting.popleft())
        if written:
            waiting[0] = waiting[0][written:]
    forget(descriptor, start, size)  # starts writing dirty pages to the disk; they stay in memory
    if start > _ON_THEIR_WAY:
        forget(
            descriptor, 0, start - _ON_THEIR_WAY
        )  # from the beginning, because a busy disk may have finished older pages only now


_local = threading.local()


def _sum(descriptor: int, start: int) -> int:
    """CRC-32 of the piece that begins at `start`."""
    if not hasattr(_local, "buffer"):
        _local.buffer = memoryview(bytearray(_STRIDE))
    total = 0
    for position in range(start, start + PIECE_BYTES, _STRIDE):
        count = os.preadv(descriptor, [_local.buffer], position)
        total = zlib.crc32(_local.buffer[:count], total)
        if count < _STRIDE:
            break
    forget(descriptor, start, PIECE_BYTES)
    return total


def _digest(size: int, sums: Sequence[int]) -> str:
    return hashlib.sha256(b"".join(value.to_bytes(8, "little") for value in (size, *sums))).hexdigest()
