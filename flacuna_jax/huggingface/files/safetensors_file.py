"""The safetensors layout: a length, a JSON header, then the tensors' bytes (github.com/huggingface/safetensors).

The library is not used, because streaming needs views of a memory map, also in bfloat16, and because a checkpoint is
written tensor by tensor, without collecting all tensors first.
"""

import itertools
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from flacuna_jax.errors import UserError
from flacuna_jax.git_lfs import require_content
from flacuna_jax.huggingface.files.pieces import Maker, write_pieces
from flacuna_jax.huggingface.files.tensors import BFLOAT16, StoredTensor

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000


def read_header(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file. All offsets are checked against the file.

    Raises:
      UserError: the file is missing or torn, or its header does not conform to the format.
    """
    require_content(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            raw = file.read(length) if 0 < length <= min(_MAX_HEADER, size - 8) else b""
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    if not raw:
        raise UserError(f"{path} is not a safetensors file, or is torn: its first 8 bytes give no header length")
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: the safetensors header cannot be read: {error}") from None
    if not isinstance(header, dict):
        raise UserError(f"{path}: the safetensors header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path}: the safetensors metadata is not a table of strings")
    tensors = {name: _tensor(path, name, entry, 8 + length) for name, entry in header.items()}
    _check_coverage(path, tensors, 8 + length, size)
    return tensors, metadata


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} appears twice")
    return table


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{path}: tensor {name} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{path}: tensor {name} has dtype {dtype!r}; known are {', '.join(DTYPES)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise UserError(f"{path}: tensor {name} has no valid shape and data_offsets")
    tensor = StoredTensor(path, data_start + offsets[0], tuple(shape), DTYPES[dtype])
    if tensor.end != data_start + offsets[1]:
        raise UserError(
            f"{path}: tensor {name} of shape {shape} and dtype {dtype} needs {tensor.nbytes} bytes, "
            f"but its data_offsets give {offsets[1] - offsets[0]}"
        )
    return tensor


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 60 for item in value)


def _check_coverage(path: Path, tensors: Mapping[str, StoredTensor], data_start: int, size: int) -> None:
    """Checks that there are no gaps or overlaps, which the format forbids; this detects torn and overwritten files."""
    position = data_start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].end)):
        if tensor.offset != position:
            raise UserError(f"{path}: tensor {name} starts at byte {tensor.offset}, but must start at {position}")
        position = tensor.end
    if position != size:
        raise UserError(
            f"{path} has {size} bytes, but its header describes {position}; the file is torn or was changed"
        )


def make_header(tensors: Sequence[tuple[str, tuple[int, ...], np.dtype]]) -> bytes:
    """Length and header of a file whose tensors follow in the given order, padded to 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape, dtype in tensors:
        end = position + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def write_file(path: Path, tensors: Sequence[tuple[str, tuple[int, ...], np.dtype]], makers: Iterable[Maker]) -> str:
    """Writes one file from values that are computed on demand, and returns its digest (`pieces.file_digest`).

    Args:
      path: file to create.
      tensors: (name, shape, dtype) in file order.
      makers: compute the values in that order; an array may be any contiguous piece of the current tensor (some rows,
        or one layer of a stacked tensor), as long as the pieces add up.

    Raises:
      UserError: the file cannot be written; also any exception of the makers.
    """
    header = np.frombuffer(make_header(tensors), np.uint8)
    size = sum(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for _, shape, dtype in tensors)
    return write_pieces(path, len(header) + size, itertools.chain([lambda: header], makers))
