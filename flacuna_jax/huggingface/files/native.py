"""The native checkpoint format: one safetensors file per stacked parameter, and a manifest that is written last.

`params/layers.q_proj.weight.safetensors` contains [L, out, in] contiguously, so a slice of a layer is a window of the
file: a process reads exactly the slices of its devices, and writing needs only some rows in memory, not a whole leaf
(5.3 GiB at 13B). config.json and the tokenizer files are copied unchanged. A directory without a manifest is not a
checkpoint.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.architecture import read_architecture
from flacuna_jax.huggingface.files.json_file import read_json
from flacuna_jax.huggingface.files.safetensors_file import read_header, write_file
from flacuna_jax.huggingface.files.tensors import (
    StoredTensor,
    TensorReader,
    cast,
    common_dtype,
    is_finite,
    overflow,
    row_blocks,
)
from flacuna_jax.model.parameters import base_parameters

MANIFEST = "flacuna.json"
FORMAT = "flacuna_jax checkpoint"
VERSION = 2
PARAMS = "params"


def is_native(directory: Path) -> bool:
    return (directory / MANIFEST).is_file()


def write_parameter(
    directory: Path, reader: TensorReader, path: str, stacked: bool, sources: tuple[str, ...], dtype: np.dtype | None
) -> dict[str, Any]:
    """Writes one parameter, layer by layer, and returns its entry for the manifest.

    Args:
      directory: the checkpoint being written.
      reader: the source of the tensors.
      path: the parameter.
      stacked: whether it has a leading layer axis.
      sources: its tensors, in layer order.
      dtype: None keeps the stored dtype (the narrowest one that represents all layers exactly).

    Raises:
      UserError: a tensor is not finite.
    """
    dtype = dtype or common_dtype(reader.dtype(name) for name in sources)
    shape = (*((len(sources),) if stacked else ()), *reader.shape(sources[0]))
    file = f"{PARAMS}/{path.replace('/', '.')}.safetensors"
    (directory / PARAMS).mkdir(exist_ok=True)
    makers = (
        functools.partial(_read, reader, name, rows, dtype)
        for name in sources
        for rows in row_blocks(reader.shape(name), reader.dtype(name).itemsize)
    )
    digest = write_file(directory / file, [(path, shape, dtype)], makers)
    return {"file": file, "shape": list(shape), "dtype": dtype.name, "digest": digest}


def _read(reader: TensorReader, name: str, rows: slice, dtype: np.dtype) -> np.ndarray:
    value = reader.read(name, rows)
    value = value if value.dtype == dtype else cast(value, dtype)
    if not is_finite(value):
        why = overflow(value) or f" (as {dtype.name}); it is damaged"
        raise UserError(f"{reader.directory}: {name} contains infinities or NaNs{why}")
    return value


def write_manifest(directory: Path, leaves: Mapping[str, Mapping[str, Any]], **facts: Any) -> None:
    manifest = {"format": FORMAT, "version": VERSION, **facts, "parameters": leaves}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a converted checkpoint.

    Raises:
      UserError: it is damaged, or has a version that this release does not support.
    """
    path = directory / MANIFEST
    manifest = read_json(path)
    if manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise UserError(
            f"{path}: expected {FORMAT!r} version {VERSION}, found {manifest.get('format')!r} version "
            f"{manifest.get('version')!r}; convert the model again with this release"
        )
    parameters = manifest.get("parameters")
    if not isinstance(parameters, dict) or not all(map(_is_entry, parameters.values())):
        raise UserError(f"{path} is damaged: its list of parameters cannot be read; convert the model again")
    return manifest


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and {"file", "shape", "dtype", "digest"} <= set(entry)


def read_tensors(directory: Path) -> dict[str, StoredTensor]:
    """The tensors of a converted checkpoint under their Hugging Face names, one per layer.

    Raises:
      UserError: a file is missing or torn, or does not match the manifest.
    """
    tensors: dict[str, StoredTensor] = {}
    parameters = base_parameters(read_architecture(directory))
    for path, entry in read_manifest(directory)["parameters"].items():
        if path not in parameters:
            raise UserError(f"{directory / MANIFEST} lists the parameter {path!r}, which does not exist in a LLaMA")
        parameter, leaf = parameters[path], _read_leaf(directory, path, entry)
        if not parameter.stacked:
            tensors[parameter.tensor()] = leaf
            continue
        layers, *shape = leaf.shape
        size = leaf.nbytes // layers
        for layer in range(layers):
            place = leaf.offset + layer * size
            tensors[parameter.tensor(layer)] = StoredTensor(leaf.file, place, tuple(shape), leaf.dtype)
    return tensors


def _read_leaf(directory: Path, path: str, entry: Mapping[str, Any]) -> StoredTensor:
    file = directory / str(entry["file"])
    if file.parent != directory / PARAMS:
        raise UserError(f"{directory / MANIFEST} lists the parameter {path!r} in {file}, which is not in {PARAMS}/")
    tensors, _ = read_header(file)
    leaf = tensors.get(path)
    if leaf is None or 0 in leaf.shape or [list(leaf.shape), leaf.dtype.name] != [entry["shape"], entry["dtype"]]:
        raise UserError(f"{file} does not match {MANIFEST}; convert the model again")
    return leaf
