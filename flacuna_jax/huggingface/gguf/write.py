"""Writes a model as a GGUF file, some rows of a tensor at a time."""

import itertools
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.files.meta import interleaved
from flacuna_jax.huggingface.files.pieces import Maker, write_pieces
from flacuna_jax.huggingface.files.tensors import BFLOAT16, as_bytes, cast, is_finite, overflow, row_blocks
from flacuna_jax.huggingface.forms import GgufType
from flacuna_jax.huggingface.gguf import gguf_package
from flacuna_jax.huggingface.gguf.architectures import Architecture, named_tensors
from flacuna_jax.huggingface.gguf.header import DEFAULT_ALIGNMENT
from flacuna_jax.huggingface.gguf.settings import rope_tensors
from flacuna_jax.huggingface.merged import PendingTensor
from flacuna_jax.model.llama import LlamaConfig

FLOAT = np.dtype(np.float32)
_FILE_TYPES = {"f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
_Q8_BLOCK = 32


@dataclass(frozen=True)
class WrittenTensor:
    """A tensor of the file.

    Attributes:
      name: llama.cpp's name.
      source: makes its rows in float32 and Hugging Face's order.
      kind: "F32", "F16", "BF16" or "Q8_0".
      head_dim: for permuted rows; 0 for the others.
      offset: is added to the values.
    """

    name: str
    source: PendingTensor
    kind: str
    head_dim: int
    offset: float

    @property
    def nbytes(self) -> int:
        count = math.prod(self.source.shape)
        return {"F32": count * 4, "F16": count * 2, "BF16": count * 2, "Q8_0": count // _Q8_BLOCK * 34}[self.kind]

    def blocks(self) -> list[slice]:
        """Rows that are made at a time; whole heads if they are permuted."""
        if not self.head_dim:
            return row_blocks(self.source.shape, FLOAT.itemsize)
        heads = (self.source.shape[0] // self.head_dim, self.head_dim, *self.source.shape[1:])
        return [slice(b.start * self.head_dim, b.stop * self.head_dim) for b in row_blocks(heads, FLOAT.itemsize)]

    def make(self, rows: slice) -> np.ndarray:
        """Some rows as they are in the file. Raises `UserError` if a value is not finite."""
        values = self.source.make(rows)
        if self.head_dim:
            ordered = np.empty_like(values)
            ordered[interleaved(np.arange(len(values)), self.head_dim)] = values
            values = ordered
        if self.offset:
            values = values + np.float32(self.offset)
        encoded = self._encode(values)
        if not is_finite(values) or (self.kind != "Q8_0" and not is_finite(encoded)):
            why = overflow(encoded).replace("(--dtype)", "(--gguf-type bf16)") if is_finite(values) else ""
            raise UserError(f"{self.source.name} contains infinities or NaNs{why or '; the base is damaged'}")
        return encoded

    def largest_error(self, values: np.ndarray) -> np.ndarray:
        """The most by which rounding may change each of some rows: half a step of the type. In Q8_0, steps are the
        127th part of a block's largest value, and are rounded to float16."""
        sizes = np.abs(values)
        if self.kind == "Q8_0":
            blocks = sizes.reshape(*sizes.shape[:-1], -1, _Q8_BLOCK).max(-1, keepdims=True)
            sizes = np.broadcast_to(blocks, (*blocks.shape[:-1], _Q8_BLOCK)).reshape(sizes.shape)
            return sizes * (0.5 / 127 + 2.0**-10) + 127 * 2.0**-24
        relative, absolute = {"F32": (0.0, 0.0), "F16": (2.0**-11, 2.0**-25), "BF16": (2.0**-8, 0.0)}[self.kind]
        return relative * sizes + absolute

    def _encode(self, values: np.ndarray) -> np.ndarray:
        if self.kind == "Q8_0":
            gguf = gguf_package()
            return gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        return cast(values, {"F32": FLOAT, "F16": np.dtype(np.float16), "BF16": BFLOAT16}[self.kind])


def written_tensors(
    tensors: Sequence[PendingTensor], architecture: Architecture, config: LlamaConfig, kind: GgufType
) -> list[WrittenTensor]:
    """The tensors of the file, in order: matrices in `kind`, vectors in float32 as llama.cpp needs them.

    Args:
      tensors: those of the model, in float32.
      architecture: llama.cpp's.
      config: sizes.
      kind: of matrices; rows that are no whole blocks of q8_0 are float16.
    """
    known = {tensor.name: tensor for tensor in named_tensors(architecture, config)}
    found = []
    for tensor in tensors:
        named = known[tensor.name]
        stored = "F32" if len(tensor.shape) < 2 else kind.upper()
        if stored == "Q8_0" and tensor.shape[-1] % _Q8_BLOCK:
            stored = "F16"
        head_dim = architecture.head_dim_of(named.parameter, config)
        found.append(WrittenTensor(named.theirs, tensor, stored, head_dim, architecture.offset_of(named.parameter)))
    for name, divisors in rope_tensors(config).items():
        source = PendingTensor(name, divisors.shape, FLOAT, divisors.__getitem__)
        found.append(WrittenTensor(name, source, "F32", 0, 0.0))
    return found


def write_file(
    path: Path, architecture: str, metadata: Mapping[str, Any], tensors: Sequence[WrittenTensor], kind: GgufType
) -> str:
    """Writes the file and returns its digest (`pieces.file_digest`).

    Raises:
      UserError: the file cannot be written, or a value is not finite.
    """
    gguf = gguf_package()
    file_type = {"general.file_type": int(gguf.LlamaFileType[_FILE_TYPES[kind]]), "general.quantization_version": 2}
    header = np.frombuffer(_header(architecture, {**metadata, **file_type}, tensors), np.uint8)
    sizes = [tensor.nbytes + _padding(tensor.nbytes) for tensor in tensors]
    pieces = itertools.chain.from_iterable(_pieces(tensor) for tensor in tensors)
    return write_pieces(path, len(header) + sum(sizes), itertools.chain([lambda: header], pieces))


def _pieces(tensor: WrittenTensor) -> Iterator[Maker]:
    for rows in tensor.blocks():
        yield lambda rows=rows: np.frombuffer(as_bytes(tensor.make(rows)), np.uint8)  # type: ignore[misc]
    if padding := _padding(tensor.nbytes):
        yield lambda: np.zeros(padding, np.uint8)


def _padding(nbytes: int) -> int:
    return -nbytes % DEFAULT_ALIGNMENT


def _header(architecture: str, metadata: Mapping[str, Any], tensors: Sequence[WrittenTensor]) -> bytes:
    """The bytes before the first tensor, by the writer of the package gguf."""
    gguf = gguf_package()
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "header.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        for key, value in metadata.items():
            _add(writer, key, value)
        for tensor in tensors:
            stored = gguf.GGMLQuantizationType[tensor.kind]
            writer.add_tensor_info(tensor.name, tensor.source.shape, FLOAT, tensor.nbytes, stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        content = path.read_bytes()
    return content + bytes(_padding(len(content)))


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
