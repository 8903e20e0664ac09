"""Tensors in files: strided windows of bytes, viewed through a memory map without loading them."""

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
    """The location and layout of a tensor in a file.

    Attributes:
      file: the file that contains it.
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
        """Size of the values in bytes (not of the window, which can be larger or smaller because of strides)."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """One past the last byte of a view."""
        if 0 in self.shape:
            return self.offset
        if self.strides is None:
            return self.offset + self.nbytes
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return self.offset + last + self.dtype.itemsize

    def read(self, files: "MappedFiles", rows: slice = ALL_ROWS) -> np.ndarray:
        """A read-only view of the file's pages; only those of the rows are read. Raises like `view`."""
        return files.view(self if rows == ALL_ROWS else self.of_rows(rows))

    def of_rows(self, rows: slice) -> "StoredTensor":
        """Some of the rows as a separate tensor."""
        start, stop, _ = rows.indices(self.shape[0])
        step = math.prod(self.shape[1:]) * self.dtype.itemsize if self.strides is None else self.strides[0]
        shape = (max(0, stop - start), *self.shape[1:])
        return dataclasses.replace(self, offset=self.offset + start * step, shape=shape)


class ReadableTensor(Protocol):
    """A tensor in one file, or in parts."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype: ...

    def read(self, files: "MappedFiles", rows: slice = ALL_ROWS) -> np.ndarray:
        """Some of the rows, as views of the files' pages if possible."""
        ...


@dataclasses.dataclass(frozen=True)
class RowsOfTensor:
    """Consecutive rows of a tensor as a tensor of its own."""

    whole: ReadableTensor
    rows: slice

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows.stop - self.rows.start, *self.whole.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        return self.whole.dtype

    def read(self, files: "MappedFiles", rows: slice = ALL_ROWS) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        return self.whole.read(files, slice(self.rows.start + start, self.rows.start + stop))


class MappedFiles:
    """Memory maps of files, one each, which stay open as long as views of them are requested.

    Args:
      once: whether the files are read from end to end, only once. Then pages of earlier views are dropped from the page
        cache, except for the last ones, so that a model as large as memory does not evict anything else. Views stay
        valid.
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
            raise UserError(
                f"{tensor.file} ends at byte {len(pages)}, but a tensor in it needs {tensor.end}; it is torn"
            )
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
        """Records a view, and drops the pages of the oldest ones."""
        with self._lock:
            self._held += 0 if tensor in self._recent else tensor.end - tensor.offset
            self._recent[tensor] = None
            self._recent.move_to_end(tensor)
            while self._held > _LINGERING:
                oldest, _ = self._recent.popitem(last=False)
                self._held -= oldest.end - oldest.offset
                first = oldest.offset // mmap.PAGESIZE * mmap.PAGESIZE
                if hasattr(mmap, "MADV_DONTNEED"):  # mapped pages cannot be dropped from the page cache
                    self._maps[oldest.file].madvise(mmap.MADV_DONTNEED, first, oldest.end - first)
                with contextlib.suppress(OSError), oldest.file.open("rb") as file:
                    forget(file.fileno(), first, oldest.end - first)


_LINGERING = 1 << 28
"""Bytes of recent views that stay in the page cache, for readers that need them again soon."""


def forget(descriptor: int, start: int = 0, size: int = 0) -> None:
    """Advises the system that some bytes of a file, or all from `start` on, need not stay in the page cache: it drops
    clean pages, and starts writing dirty pages to the disk."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_DONTNEED)


class TensorReader(Protocol):
    """Named tensors that are read on demand: a checkpoint, or a sum of two."""

    @property
    def directory(self) -> Path:
        """The directory, for messages and for the files other than weights."""
        ...

    def __iter__(self) -> Iterator[str]: ...

    def __contains__(self, name: object) -> bool: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> np.dtype: ...

    def read(self, name: str, rows: slice = ALL_ROWS) -> np.ndarray:
        """The tensor, or some of its rows (its first axis), read-only. Other rows are not read."""
        ...


def common_dtype(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The narrowest dtype that represents all given floating dtypes exactly (float16 and bfloat16: float32)."""
    distinct = list(dict.fromkeys(np.dtype(dtype) for dtype in dtypes))
    if len(distinct) == 1:
        return distinct[0]
    if np.dtype(np.float64) in distinct:
        return np.dtype(np.float64)
    return np.dtype(np.float32)


def host_device() -> jax.Device:
    """The CPU device of JAX, or an accelerator if JAX_PLATFORMS excludes the CPU."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return jax.local_devices()[0]


def as_bytes(array: np.ndarray) -> memoryview:
    """The array's bytes in row-major order, without a copy if it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


BLOCK_BYTES = 1 << 22
"""Bytes that are converted at a time; larger arrays would need new pages, which the kernel has to clear first."""


def row_blocks(shape: tuple[int, ...], itemsize: int, nbytes: int = BLOCK_BYTES) -> list[slice]:
    """Splits a tensor along its first axis into blocks of about `nbytes`, of at least one row each."""
    rows = max(1, nbytes // max(1, math.prod(shape[1:]) * itemsize))
    return [slice(start, min(start + rows, shape[0])) for start in range(0, shape[0], rows)]


def cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The values in `dtype` as a new contiguous array, rounded once to nearest even."""
    if array.dtype == BFLOAT16 and dtype == np.float32:
        # A bfloat16 is the upper half of a float32; shifting is five times as fast as the generic loop.
        return (np.ascontiguousarray(array).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if array.dtype == np.float16 and dtype == np.float32 and is_finite(array):
        return _widened(np.ascontiguousarray(array))
    return np.array(array, dtype=dtype, order="C")


def _widened(half: np.ndarray) -> np.ndarray:
    """Finite float16 values as float32: shifts exponent and fraction to their places and corrects the bias by a
    product, which is exact. Four times as fast as the generic loop."""
    bits = np.left_shift(half.view(np.int16), 13, dtype=np.int32)
    bits &= np.int32(-0x70002000)  # 0x8FFFE000: of the shifted sign, only the highest bit stays
    values = bits.view(np.float32)
    values *= np.float32(2.0**112)
    return values


def overflow(array: np.ndarray) -> str:
    """For values that are not finite: a hint if they are float16 infinities, which result from numbers above its
    range."""
    if array.dtype != np.float16 or np.isnan(array).any():
        return ""
    return " as float16, whose largest number is 65504: store it as bfloat16 or float32 (--dtype)"


def is_finite(array: np.ndarray, rows: int = 1 << 20) -> bool:
    """Whether no element is infinite or NaN, at the speed of memory and without a copy of the whole array.

    float16 and bfloat16 are examined as integers: a value is not finite if all exponent bits are set.
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
