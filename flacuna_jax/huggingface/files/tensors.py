"""A tensor as it lies in a file: a strided window of bytes, viewed through a memory map without being loaded."""

import contextlib
import dataclasses
import math
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import jax
import ml_dtypes
import numpy as np

from flacuna_jax.errors import UserError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ALL_ROWS = slice(None)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and how to read it.

    Attributes:
      file: the file that holds it.
      offset: first byte of element 0.
      shape: dimensions.
      dtype: NumPy dtype (bfloat16 through ml_dtypes), little-endian.
      strides: bytes per step of each dimension; None for contiguous, last dimension fastest.
    """

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        """Size of the values (not of the window, which strides can make larger or smaller)."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """One past the last byte that a view touches."""
        if 0 in self.shape:
            return self.offset
        if self.strides is None:
            return self.offset + self.nbytes
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return self.offset + last + self.dtype.itemsize

    def read(self, files: "MappedFiles", rows: slice = ALL_ROWS) -> np.ndarray:
        """A read-only view of the file's pages; only those of the rows are read. Raises as `view`."""
        return files.view(self if rows == ALL_ROWS else self.of_rows(rows))

    def of_rows(self, rows: slice) -> "StoredTensor":
        """Some of the rows as a tensor of their own."""
        start, stop, _ = rows.indices(self.shape[0])
        step = math.prod(self.shape[1:]) * self.dtype.itemsize if self.strides is None else self.strides[0]
        shape = (max(0, stop - start), *self.shape[1:])
        return dataclasses.replace(self, offset=self.offset + start * step, shape=shape)


class ReadableTensor(Protocol):
    """A tensor in one place, or in parts."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, files: "MappedFiles", rows: slice = ALL_ROWS) -> np.ndarray:
        """Some of the rows; views of the files' pages where that is possible."""
        ...


class MappedFiles:
    """Memory maps of files, one each, kept open as long as views of them are handed out.

    Args:
      once: whether the files are read from end to end and then no more. Pages that were handed out then leave the
        system's memory again, all but the last of them; a model as large as memory pushes nothing else out of it.
        Views stay valid.
    """

    def __init__(self, once: bool = False) -> None:
        self._maps: dict[Path, mmap.mmap] = {}
        self._once, self._held = once, 0
        self._recent: OrderedDict[StoredTensor, None] = OrderedDict()
        self._lock = threading.Lock()

    def view(self, tensor: StoredTensor) -> np.ndarray:
        """The tensor as a read-only array over the file's pages.

        Raises:
          UserError: the file is shorter than the tensor needs, or cannot be opened.
        """
        if 0 in tensor.shape:
            return np.zeros(tensor.shape, tensor.dtype)
        pages = self._map(tensor.file)
        if tensor.end > len(pages):
            raise UserError(f"{tensor.file} ends at byte {len(pages)}, a tensor in it needs {tensor.end}; it is torn")
        if self._once:
            self._pass(tensor)
        return np.ndarray(tensor.shape, tensor.dtype, pages, tensor.offset, tensor.strides)

    def _map(self, path: Path) -> mmap.mmap:
        if path not in self._maps:
            try:
                with path.open("rb") as file:
                    self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise UserError(f"{path} cannot be read: {error}") from None
        return self._maps[path]

    def _pass(self, tensor: StoredTensor) -> None:
        """Notes what is handed out, and lets the oldest of it go."""
        with self._lock:
            self._held += 0 if tensor in self._recent else tensor.end - tensor.offset
            self._recent[tensor] = None
            self._recent.move_to_end(tensor)
            while self._held > _LINGERING:
                oldest, _ = self._recent.popitem(last=False)
                self._held -= oldest.end - oldest.offset
                first = oldest.offset // mmap.PAGESIZE * mmap.PAGESIZE
                if hasattr(mmap, "MADV_DONTNEED"):  # pages that a map refers to cannot leave memory
                    self._maps[oldest.file].madvise(mmap.MADV_DONTNEED, first, oldest.end - first)
                with contextlib.suppress(OSError), oldest.file.open("rb") as file:
                    forget(file.fileno(), first, oldest.end - first)


_LINGERING = 1 << 28
"""Bytes that stay for whoever reads them again soon."""


def forget(descriptor: int, start: int = 0, size: int = 0) -> None:
    """Tells the system that some bytes of a file, or all from `start` on, need not stay in memory: it lets go of pages
    that the disk has, and sends those to it that it does not have."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_DONTNEED)


class TensorReader(Protocol):
    """Named tensors that are read when asked for: a checkpoint, or a sum of two."""

    @property
    def directory(self) -> Path:
        """For messages, and for the files beside the weights."""
        ...

    def __iter__(self) -> Iterator[str]: ...

    def __contains__(self, name: object) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> np.dtype: ...

    def read(self, name: str, rows: slice = ALL_ROWS) -> np.ndarray:
        """The tensor, or some of its rows (its first axis), read-only; what other rows hold is not read."""
        ...


def common_dtype(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The narrowest dtype that holds values of all given floating dtypes exactly (half with bfloat16: float32)."""
    distinct = list(dict.fromkeys(np.dtype(dtype) for dtype in dtypes))
    if len(distinct) == 1:
        return distinct[0]
    if np.dtype(np.float64) in distinct:
        return np.dtype(np.float64)
    return np.dtype(np.float32)


def host_device() -> jax.Device:
    """The CPU as a device of jax, or an accelerator where JAX_PLATFORMS leaves the CPU out."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def as_bytes(array: np.ndarray) -> memoryview:
    """The array's bytes in row-major order, without a copy where it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


BLOCK_BYTES = 1 << 22
"""What is converted at a time: larger arrays would come as fresh pages from the kernel, each of them cleared first."""


def row_blocks(shape: tuple[int, ...], itemsize: int, nbytes: int = BLOCK_BYTES) -> list[slice]:
    """Cuts a tensor along its first axis into blocks of about `nbytes`, at least one row each."""
    rows = max(1, nbytes // max(1, math.prod(shape[1:]) * itemsize))
    return [slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]


def cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The values in `dtype` as a fresh contiguous array, rounded once to nearest even."""
    if array.dtype == BFLOAT16 and dtype == np.float32:
        # A bfloat16 is the upper half of a float32; shifting is five times as fast as the generic loop.
        return (np.ascontiguousarray(array).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if array.dtype == np.float16 and dtype == np.float32 and is_finite(array):
        return _widened(np.ascontiguousarray(array))
    return np.array(array, dtype=dtype, order="C")


def _widened(half: np.ndarray) -> np.ndarray:
    """Finite halves as float32: exponent and fraction moved to their places and the bias corrected by a product, which
    is exact; four times as fast as the generic loop."""
    bits = np.left_shift(half.view(np.int16), 13, dtype=np.int32)
    bits &= np.int32(-0x70002000)  # 0x8FFFE000: the sign that the shift has spread stays in the highest bit alone
    values = bits.view(np.float32)
    values *= np.float32(2.0**112)
    return values


def overflow(array: np.ndarray) -> str:
    """For values that are not finite: a remark if they are infinities of float16, which come from larger numbers."""
    if array.dtype != np.float16 or np.isnan(array).any():
        return ""
    return " as float16, whose largest number is 65504: store it as bfloat16 or float32 (--dtype)"


def is_finite(array: np.ndarray, rows: int = 1 << 20) -> bool:
    """Whether no element is infinite or NaN, at the speed of memory and without a copy of the whole.

    Half and bfloat16 are looked at as integers: all exponent bits set means not finite.
    """
    flat = np.ascontiguousarray(array).reshape(-1)
    exponent = {np.dtype(np.float16): 0x7C00, BFLOAT16: 0x7F80}.get(array.dtype)
    for start in range(0, len(flat), rows):
        piece = flat[start : start + rows]
        if exponent is None:
            if not np.isfinite(piece).all():
                return False
        elif int((piece.view(np.uint16) & np.uint16(exponent)).max(initial=0)) == exponent:
            return False
    return True
