"""Tensors of GGUF files as those of a Hugging Face checkpoint: dequantised rows, in Hugging Face's order.

llama.cpp rotates adjacent pairs (0, 1), (2, 3), ... in some architectures, so their files have the rows of q and k in
another order within each head, as Meta's files have. In Gemma's files, norms are stored with 1 added.
"""

import dataclasses
from pathlib import Path

import numpy as np

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.files.meta import interleaved
from flacuna_jax.huggingface.files.tensors import ALL_ROWS, MappedFiles, cast
from flacuna_jax.huggingface.gguf import gguf_package
from flacuna_jax.huggingface.gguf.architectures import ROPE_TENSORS, architecture_in, named_tensors
from flacuna_jax.huggingface.gguf.header import SUFFIX, TensorInfo, read_header
from flacuna_jax.model.llama import LlamaConfig

FLOAT = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """A tensor in float32 if it is quantised, otherwise in its dtype.

    Attributes:
      info: its place and type.
      head_dim: for q and k with permuted rows; 0 for the others.
      offset: what was added to the stored values.
    """

    info: TensorInfo
    head_dim: int = 0
    offset: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def dtype(self) -> np.dtype:
        return FLOAT if self.info.is_packed or self.offset else self.info.stored.dtype

    def read(self, files: MappedFiles, rows: slice = ALL_ROWS) -> np.ndarray:
        """Some of the rows; only these, or in permuted tensors those of their heads, are dequantised."""
        if not self.head_dim:
            return self._values(files, rows)
        wanted = np.arange(*rows.indices(self.shape[0]))
        if not len(wanted):
            return self._values(files, slice(0, 0))
        first = wanted[0] // self.head_dim * self.head_dim
        last = (wanted[-1] // self.head_dim + 1) * self.head_dim
        return self._values(files, slice(first, last))[interleaved(wanted, self.head_dim) - first]

    def _values(self, files: MappedFiles, rows: slice) -> np.ndarray:
        """Some of the rows in the order of the file."""
        stored = self.info.stored.read(files, rows)
        values = dequantised(stored, self.info) if self.info.is_packed else stored
        return values if not self.offset else cast(values, FLOAT) - np.float32(self.offset)


def dequantised(packed: np.ndarray, info: TensorInfo) -> np.ndarray:
    """The float32 values of some rows of packed blocks. Raises `UserError` for a type that gguf cannot dequantise."""
    gguf = gguf_package()
    if len(info.shape) != 2:
        raise UserError(f"{info.stored.file}: quantised tensors with {len(info.shape)} dimensions are not supported")
    if not len(packed):
        return np.zeros((0, *info.shape[1:]), FLOAT)
    try:
        return gguf.dequantize(packed, gguf.GGMLQuantizationType[info.kind])
    except NotImplementedError:
        raise UserError(f"{info.stored.file}: tensors of type {info.kind} are not supported") from None


def linked_file(directory: Path) -> Path:
    """The GGUF file, or the first part of it, that a directory was made from."""
    return sorted(directory.glob(f"*{SUFFIX}"))[0].readlink()


def read_tensors(directory: Path, config: LlamaConfig) -> dict[str, GGUFTensor]:
    """The tensors of an unpacked file under their Hugging Face names; unknown ones keep theirs."""
    header = read_header(linked_file(directory))
    architecture = architecture_in(header)
    known = {tensor.theirs: tensor for tensor in named_tensors(architecture, config)}
    found = {}
    for theirs, info in header.tensors.items():
        if theirs in ROPE_TENSORS:  # they are a part of config.json
            continue
        tensor = known.get(theirs)
        if tensor is None:
            found[theirs] = GGUFTensor(info)
        else:
            parameter = tensor.parameter
            head_dim, offset = architecture.head_dim_of(parameter, config), architecture.offset_of(parameter)
            found[tensor.name] = GGUFTensor(info, head_dim, offset)
    return found


def packed_kinds(directory: Path) -> list[str]:
    """The quantised types in an unpacked file."""
    header = read_header(linked_file(directory))
    return sorted({info.kind for info in header.tensors.values() if info.is_packed})
