"""Quantised checkpoints as checkpoints in half precision: codes and scales are multiplied when rows are read.

Two kinds of scales exist. One scale belongs to a row, a block of rows and columns, or a whole matrix: the 8-bit form of
bitsandbytes (Dettmers et al., 2022, arXiv:2208.07339), and 8-bit floating point (DeepSeek-AI, 2024, arXiv:2412.19437;
FBGEMM; compressed-tensors). Or one belongs to some consecutive values, and may be quantised itself: the 4-bit forms of
bitsandbytes (Dettmers et al., 2023, arXiv:2305.14314).
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.files.tensors import (
    ALL_ROWS,
    BFLOAT16,
    MappedFiles,
    ReadableTensor,
    StoredTensor,
    as_bytes,
    cast,
)

KEY = "quantization_config"
METHODS = ("bitsandbytes", "fp8", "fbgemm_fp8", "compressed-tensors")
_FORMATS = ("float-quantized", "int-quantized", "naive-quantized")
"""The formats of compressed-tensors that have a scale for each code; in the others, codes are packed."""

FLOAT = np.dtype(np.float32)
_FP8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
_SCALES = {"weight_scale_inv": 1.0, "weight_scale": 1.0, "SCB": 1 / 127}
"""Name of a tensor of scales → what they are multiplied by."""
_UNUSED = ("weight_format", "input_scale", "input_scale_ub", "activation_scale", "k_scale", "v_scale")
"""Tensors that describe a layout or the quantisation of activations; weights do not depend on them."""
_STATE = "quant_state.bitsandbytes__"
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


def method_of(settings: Mapping[str, Any]) -> str | None:
    """The method of a quantised checkpoint that can be read; None if config.json has none, or another one."""
    given = settings.get(KEY)
    method = given.get("quant_method") if isinstance(given, dict) else None
    if isinstance(given, dict) and method == "compressed-tensors" and given.get("format") not in _FORMATS:
        return None
    return method if method in METHODS else None


def dtype_of(settings: Mapping[str, Any]) -> np.dtype:
    """The dtype of dequantised weights: that of config.json, or bfloat16."""
    name = settings.get("dtype") or settings.get("torch_dtype")
    return np.dtype(name) if name in ("float16", "float32") else BFLOAT16


@dataclasses.dataclass(frozen=True)
class ScaledTensor:
    """A matrix of 8-bit codes, int8 or floating-point, with scales.

    Attributes:
      codes: [out, in].
      scales: [rows of blocks, columns of blocks] in any floating dtype.
      block: rows and columns that share a scale.
      factor: of all scales.
      dtype: of the result.
    """

    codes: StoredTensor
    scales: StoredTensor
    block: tuple[int, int]
    factor: float
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def read(self, files: MappedFiles, rows: slice = ALL_ROWS) -> np.ndarray:
        """Some of the rows, computed in float32 and rounded once."""
        codes = self.codes.read(files, rows)
        start, stop, _ = rows.indices(self.shape[0])
        places = np.arange(start, stop) // self.block[0]
        scales = cast(files.view(self.scales), FLOAT).reshape(self._grid)[places] * np.float32(self.factor)
        if self._grid[1] > 1:
            scales = np.repeat(scales, self.block[1], axis=1)[:, : self.shape[1]]
        return cast(_values(codes) * scales, self.dtype)

    @property
    def _grid(self) -> tuple[int, int]:
        rows, columns = self.shape
        return -(-rows // self.block[0]), -(-columns // self.block[1])

    @classmethod
    def of(
        cls, name: str, codes: StoredTensor, scales: StoredTensor, factor: float, block: Any, dtype: np.dtype
    ) -> "ScaledTensor":
        """Raises `UserError` if the scales do not belong to the codes."""
        if scales.dtype.itemsize == 1:
            raise UserError(
                f"{codes.file}: the scales of {name} have dtype {scales.dtype.name}; this is not implemented"
            )
        rows, columns = codes.shape if len(codes.shape) == 2 else (0, 0)
        count = math.prod(scales.shape)
        choices = [(1, columns), (rows, columns)]
        if isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block):
            choices.insert(0, (block[0], block[1]))
        for choice in choices:
            made = cls(codes, scales, choice, factor, dtype)
            if rows and columns and math.prod(made._grid) == count:
                return made
        raise UserError(
            f"{codes.file}: {name} has shape {list(codes.shape)}, but its scales have shape {list(scales.shape)}"
        )


@functools.cache
def _table(dtype: np.dtype) -> np.ndarray:
    """The value of each of the 256 codes."""
    return np.arange(256, dtype=np.uint8).view(dtype).astype(FLOAT)


def _values(codes: np.ndarray) -> np.ndarray:
    return _table(codes.dtype)[codes.view(np.uint8)]


@dataclasses.dataclass(frozen=True)
class FourBitTensor:
    """A tensor of 4-bit codes, two in a byte, in blocks of consecutive values with a scale each.

    Attributes:
      codes: uint8, the first code of a byte in its upper half.
      scales: of the blocks: float32, or uint8 if they are quantised.
      values: float32 [16], the value of each code.
      shape: of the result.
      blocksize: values in a block.
      nested: for quantised scales: scale of each `nested_blocksize` of them, and the value of each of 256 codes.
      nested_blocksize, nested_offset: ..., and what is added to the products.
      dtype: of the result.
    """

    codes: StoredTensor
    scales: StoredTensor
    values: StoredTensor
    shape: tuple[int, ...]
    blocksize: int
    nested: tuple[StoredTensor, StoredTensor] | None
    nested_blocksize: int
    nested_offset: float
    dtype: np.dtype

    def read(self, files: MappedFiles, rows: slice = ALL_ROWS) -> np.ndarray:
        """Some of the rows, computed in float32 and rounded once; only their codes and scales are read."""
        start, stop, _ = rows.indices(self.shape[0])
        per_row = math.prod(self.shape[1:])
        first, last = start * per_row, stop * per_row
        packed = files.view(self.codes).reshape(-1)[first // 2 : -(-last // 2)]
        codes = np.stack([packed >> 4, packed & 0xF], axis=-1).reshape(-1)[first % 2 :][: last - first]
        blocks = np.arange(first, last) // self.blocksize
        begin = first // self.blocksize
        scales = self._scales(files, begin, -(-last // self.blocksize))[blocks - begin]
        values = files.view(self.values)[codes] * scales
        return cast(values.reshape(stop - start, *self.shape[1:]), self.dtype)

    def _scales(self, files: MappedFiles, begin: int, end: int) -> np.ndarray:
        stored = files.view(self.scales).reshape(-1)[begin:end]
        if self.nested is None:
            return stored
        scales, values = (files.view(part).reshape(-1) for part in self.nested)
        places = np.arange(begin, end) // self.nested_blocksize
        return values[stored] * scales[places] + np.float32(self.nested_offset)


def dequantised(tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any]) -> dict[str, ReadableTensor]:
    """The tensors of a checkpoint with its quantised weights in half precision, and without their scales.

    Args:
      tensors: name → tensor in the files.
      settings: content of config.json, whose method is one of `METHODS`.

    Raises:
      UserError: codes without scales that belong to them, or zero points.
    """
    dtype, block = dtype_of(settings), settings[KEY].get("weight_block_size")
    found: dict[str, ReadableTensor] = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight_zero_point":
            raise UserError(f"{tensor.file}: {name} exists; quantisation with zero points is not implemented")
        if f"{name}.quant_map" in tensors:
            found[name] = _four_bit(name, tensors, dtype)
        elif leaf == "weight" and tensor.dtype in (np.dtype(np.int8), *_FP8):
            scales = next((key for key in _SCALES if f"{module}.{key}" in tensors), None)
            if scales is None:
                raise UserError(f"{tensor.file}: {name} has dtype {tensor.dtype.name}, but no scales")
            stored = tensors[f"{module}.{scales}"]
            found[name] = ScaledTensor.of(name, tensor, stored, _SCALES[scales], block, dtype)
        elif not _belongs_to_weight(name, module, leaf):
            found[name] = tensor
    return found


def _belongs_to_weight(name: str, module: str, leaf: str) -> bool:
    return (
        leaf in (*_SCALES, *_UNUSED) or (f".weight.{_STATE}" in name) or (module.endswith(".weight") and leaf in _PARTS)
    )


def _four_bit(name: str, tensors: Mapping[str, StoredTensor], dtype: np.dtype) -> FourBitTensor:
    codes, files = tensors[name], MappedFiles()
    described = next((part for key, part in tensors.items() if key.startswith(f"{name}.{_STATE}")), None)
    try:
        assert described is not None
        state = json.loads(bytes(as_bytes(files.view(described))))
        shape, blocksize = tuple(map(int, state["shape"])), int(state["blocksize"])
        is_nested = "nested_blocksize" in state
        nested = (tensors[f"{name}.nested_absmax"], tensors[f"{name}.nested_quant_map"]) if is_nested else None
        found = FourBitTensor(
            dataclasses.replace(codes, dtype=np.dtype(np.uint8), shape=(codes.nbytes,)),
            tensors[f"{name}.absmax"],
            tensors[f"{name}.quant_map"],
            shape,
            blocksize,
            nested,
            int(state.get("nested_blocksize", 1)),
            float(state.get("nested_offset", 0.0)),
            dtype,
        )
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{codes.file}: the description of the 4-bit tensor {name} is damaged: {error!r}") from None
    count = math.prod(shape)
    if codes.nbytes != -(-count // 2) or math.prod(found.scales.shape) != -(-count // blocksize):
        raise UserError(f"{codes.file}: {name} of shape {list(shape)} does not have the codes and scales it needs")
    return found
