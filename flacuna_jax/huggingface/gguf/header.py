"""Reads the header of a GGUF file: metadata, and the location and type of every tensor.

The reader of the package gguf is not used: it takes seconds for a large vocabulary, and does not check that the file
is complete.
"""

import dataclasses
import math
import mmap
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flacuna_jax.errors import UserError
from flacuna_jax.git_lfs import require_content
from flacuna_jax.huggingface.files.tensors import BFLOAT16, StoredTensor
from flacuna_jax.huggingface.gguf import gguf_package

SUFFIX = ".gguf"
ALIGNMENT = "general.alignment"
DEFAULT_ALIGNMENT = 32
ARCHITECTURE = "general.architecture"

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type of a metadata value → its format in `struct`."""
_STRING, _ARRAY = 8, 9
_FLOATS = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": BFLOAT16}
"""Types of tensors that are arrays of numbers; the others consist of blocks."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor of a GGUF file.

    Attributes:
      shape: row-major, as in NumPy (files have the reverse).
      kind: name of its type, such as "F16" or "Q4_K".
      stored: its place: numbers of a floating dtype, or bytes [rows, bytes per row] of quantised blocks.
    """

    shape: tuple[int, ...]
    kind: str
    stored: StoredTensor

    @property
    def is_packed(self) -> bool:
        return self.kind not in _FLOATS


@dataclasses.dataclass(frozen=True)
class Header:
    """Metadata and tensors of a GGUF file, or of all parts of a split one."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A value of the metadata. Raises `UserError` if it has another type."""
        value = self.metadata.get(key)
        if value is None:
            return default
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise UserError(f"{self.path}: {key} is {value!r}, not a value of type {kind.__name__}")
        return value

    @property
    def architecture(self) -> str:
        return self.get(ARCHITECTURE, str, "")


_OTHER_MODELS = ("config.json", "params.json", "adapter_config.json")
"""Files of directories in which GGUF files are not looked for."""
_COPY_AGAIN = "download or copy it again"
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def parts(path: Path) -> list[Path]:
    """All parts of a split file (NAME-00001-of-00003.gguf), in order; [path] if it is not split.

    Raises:
      UserError: a part is missing.
    """
    match = _PART.fullmatch(path.name)
    if match is None:
        return [path]
    found = [path.with_name(f"{match[1]}-{n + 1:05}-of-{match[3]}.gguf") for n in range(int(match[3]))]
    if missing := next((part for part in found if not part.is_file()), None):
        raise UserError(f"{missing} is missing; {path.name} is a part of a file in {len(found)} parts")
    return found


def without_part(name: str) -> str:
    """The name of a file without the number of a part."""
    match = _PART.fullmatch(name)
    return name if match is None else f"{match[1]}{SUFFIX}"


def gguf_in(path: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the only one in a directory without another model; else None.

    Raises:
      UserError: a directory has several.
    """
    if path.suffix == SUFFIX and path.is_file():
        return path
    if not path.is_dir() or any((path / name).exists() for name in _OTHER_MODELS):
        return None
    found = sorted(path.glob(f"*{SUFFIX}"))
    if len({parts(one)[0] for one in found}) > 1:
        raise UserError(f"{path} contains several GGUF files; give one of them: {', '.join(one.name for one in found)}")
    return found[0] if found else None


def read_header(path: Path) -> Header:
    """Reads the headers of a file and of its other parts. All offsets are checked against the files.

    Raises:
      UserError: the package gguf is not installed; the file is missing, torn, or not GGUF of version 2 or 3 in
        little-endian order; or a tensor has an unknown type.
    """
    first, *others = (_read_part(part) for part in parts(path))
    tensors = dict(first.tensors)
    for other in others:
        if twice := sorted(tensors.keys() & other.tensors.keys()):
            raise UserError(f"{other.path} contains {twice[0]}, which is in another part, too")
        tensors |= other.tensors
    return Header(first.path, first.metadata, tensors)


def _read_part(path: Path) -> Header:
    require_content(path)
    try:
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty; {_COPY_AGAIN}")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
            return _parse(path, _Cursor(path, pages))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


class _Cursor:
    """Reads values one after another, and checks that the file has them."""

    def __init__(self, path: Path, pages: mmap.mmap) -> None:
        self.path, self.pages, self.position = path, pages, 0

    def take(self, count: int) -> bytes:
        start, self.position = self.position, self.position + count
        if self.position > len(self.pages):
            raise UserError(f"{self.path} is torn: it ends at byte {len(self.pages)}, within its header; {_COPY_AGAIN}")
        return self.pages[start : self.position]

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind != _ARRAY:
            raise UserError(f"{self.path} is damaged: its metadata have a value of type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            form = np.dtype(_SCALARS[inner]).newbyteorder("<")
            return np.frombuffer(self.take(count * form.itemsize), form).tolist()
        if inner != _STRING:
            raise UserError(f"{self.path} is damaged: its metadata have an array of type {inner}")
        return [self.text() for _ in range(count)]


def _parse(path: Path, cursor: _Cursor) -> Header:
    if cursor.take(4) != _MAGIC:
        raise UserError(f"{path} is not a GGUF file: it does not begin with {_MAGIC.decode()}")
    version = cursor.number("I")
    if version not in _VERSIONS:
        big = ", or was written on a big-endian machine" if version > 1 << 16 else ""
        raise UserError(f"{path} is GGUF of version {version}{big}; versions 2 and 3, little-endian, are supported")
    tensor_count, value_count = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(value_count):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.number("I"))
    described = [_describe(cursor) for _ in range(tensor_count)]
    alignment = metadata.get(ALIGNMENT, DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1:
        raise UserError(f"{path} is damaged: {ALIGNMENT} is {alignment!r}")
    start = cursor.position + -cursor.position % alignment
    tensors = {}
    for name, shape, kind, offset in described:
        tensors[name] = _tensor(path, name, shape, kind, start + offset)
        if tensors[name].stored.end > len(cursor.pages):
            raise UserError(
                f"{path} is torn: it ends at byte {len(cursor.pages)}, but {name} needs {tensors[name].stored.end}; "
                f"{_COPY_AGAIN}"
            )
    return Header(path, metadata, tensors)


def _describe(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, dimensions = cursor.text(), cursor.number("I")
    sizes = [cursor.number("Q") for _ in range(dimensions)]
    return name, tuple(reversed(sizes)), cursor.number("I"), cursor.number("Q")


def _tensor(path: Path, name: str, shape: tuple[int, ...], number: int, offset: int) -> TensorInfo:
    gguf = gguf_package()
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError:
        raise UserError(f"{path}: tensor {name} has type {number}, which this version of gguf does not know") from None
    if kind.name in _FLOATS:
        return TensorInfo(shape, kind.name, StoredTensor(path, offset, shape, _FLOATS[kind.name]))
    values, size = gguf.GGML_QUANT_SIZES[kind]
    if not shape or shape[-1] % values:
        raise UserError(f"{path}: the rows of {name}, of shape {list(shape)}, are not whole blocks of {kind.name}")
    packed = (math.prod(shape[:-1]), shape[-1] // values * size)
    return TensorInfo(shape, kind.name, StoredTensor(path, offset, packed, np.dtype(np.uint8)))
