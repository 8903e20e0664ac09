"""Loads files into stacked, sharded arrays, one layer of one parameter at a time."""

import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface import names
from flacuna_jax.huggingface.architecture import read_architecture
from flacuna_jax.huggingface.files.read import open_checkpoint
from flacuna_jax.huggingface.files.tensors import ALL_ROWS, TensorReader, as_bytes, cast, row_blocks
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import ModelSpec, base_parameters
from flacuna_jax.model.variables import Parameter

FLOATING = frozenset({"float16", "bfloat16", "float32", "float64"})
_SAMPLE = 4096
STACKED_ON_HOST = 256 << 20
"""Maximum size in bytes of a parameter whose layers are stacked on the host. A larger one is stacked on the devices,
one layer at a time, which needs memory for one layer but a compiled program for each shape."""

__all__ = ["fingerprint", "load_base", "match_tensors", "read_architecture"]

Sources = dict[str, tuple[str, ...]]


def load_base(
    base: str | Path | TensorReader,
    config: LlamaConfig,
    shardings: Mapping[str, NamedSharding],
    dtype: jnp.dtype | str,
    *,
    keep: Callable[[str, jax.Array], dict[str, jax.Array]] = lambda path, leaf: {path: leaf},
) -> dict[str, jax.Array]:
    """The base weights of a checkpoint as stacked arrays on the devices.

    Each process reads only the slices of its devices. In addition to the result and the page cache, it needs memory for
    one layer of one parameter, on the host and on the devices, and at most for `STACKED_ON_HOST` bytes on the host.

    Args:
      base: directory of a checkpoint, or an open one.
      config: its architecture, from `read_architecture`.
      shardings: for every path of `base_parameters(config)`.
      dtype: of the result, independent of the files.
      keep: applied to each parameter as soon as it is loaded, for example to quantise it.

    Raises:
      UserError: the files cannot be read, or a tensor is missing, unexpected, not floating-point or has the wrong
        shape.
    """
    reader = open_checkpoint(base) if isinstance(base, str | Path) else base
    sources = match_tensors(reader, config)
    loaded: dict[str, jax.Array] = {}
    for path, parameter in base_parameters(config).items():
        loaded |= keep(path, _load_leaf(reader, parameter, sources[path], shardings[path], jnp.dtype(dtype)))
    return loaded


def match_tensors(reader: TensorReader, config: LlamaConfig) -> Sources:
    """Parameter path → its tensors in the files, in layer order. Every tensor and every parameter must have a match.

    Raises:
      UserError: lists missing tensors, unexpected tensors, and those with a wrong shape or dtype.
    """
    if names.is_training_checkpoint(reader):
        raise UserError(
            f"{reader.directory} is a training checkpoint that contains both a base and an adapter; "
            f"`flacuna convert` extracts the adapter (with --base, the base)"
        )
    left_over = {name for name in reader if not names.is_ignored(name)}
    if config.num_layers > len(left_over):
        raise UserError(
            f"{reader.directory}: config.json has {config.num_layers} layers, but there are {len(left_over)} tensors"
        )
    sources = {path: parameter.tensors for path, parameter in base_parameters(config).items()}
    if config.tie_word_embeddings:
        sources[ModelSpec(config).embedding] = (_tied_source(reader),)
        left_over.discard(names.HEAD)
    wanted = {name for tensors in sources.values() for name in tensors}
    stored = {p.tensor(layer): p.stored(layer) for p in base_parameters(config).values() for layer in p.layers}
    missing = sorted({stored.get(name, name) for name in wanted - set(reader)})
    extra = sorted(left_over - wanted)
    if missing or extra:
        raise UserError(f"{reader.directory} does not match its config.json{_accounting(missing, extra)}")
    _check_tensors(reader, config, sources)
    return sources


def names_in(reader: TensorReader, config: LlamaConfig) -> dict[str, str]:
    """The name of each tensor of the network → its name in the files. Raises UserError as `match_tensors` does."""
    sources = match_tensors(reader, config)
    return {
        parameter.tensor(layer): name
        for path, parameter in base_parameters(config).items()
        for layer, name in zip(parameter.layers, sources[path], strict=True)
    }


def _tied_source(reader: TensorReader) -> str:
    """The name of a tied model's table; some writers store it under the head's name, some under both names."""
    if names.HEAD not in reader:
        return names.EMBEDDING
    if names.EMBEDDING not in reader:
        return names.HEAD
    if not _equal(reader, names.EMBEDDING, names.HEAD):
        raise UserError(
            f"{reader.directory}: config.json ties the embeddings (tie_word_embeddings), but {names.EMBEDDING} and "
            f"{names.HEAD} differ; set it to false if the checkpoint has a separate head"
        )
    return names.EMBEDDING


def _equal(reader: TensorReader, a: str, b: str) -> bool:
    if reader.shape(a) != reader.shape(b):
        return False
    blocks = row_blocks(reader.shape(a), reader.dtype(a).itemsize)
    return all(np.array_equal(reader.read(a, rows), reader.read(b, rows)) for rows in blocks)


_QUANTISED = (".qweight", ".qzeros", ".absmax", ".quant_map", ".weight_scale", ".weight_scale_inv", ".SCB")
"""Endings of tensor names in quantised checkpoints, in addition to or instead of weights."""


def _accounting(missing: list[str], extra: list[str]) -> str:
    parts = ""
    if missing:
        parts += f"; {len(missing)} missing: {names.some(missing)}"
    if extra:
        parts += f"; {len(extra)} not in the model: {names.some(extra)}"
    if any(name.endswith(_QUANTISED) for name in extra):
        parts += "; the weights are quantised, but config.json does not say how: use those in bfloat16 or float16"
    if missing == [names.HEAD]:
        parts += " (if the model uses its embeddings as head, set tie_word_embeddings: true in config.json)"
    return parts


def _check_tensors(reader: TensorReader, config: LlamaConfig, sources: Sources) -> None:
    wrong = []
    for path, parameter in base_parameters(config).items():
        expected = parameter.layer_shape
        for name in sources[path]:
            if reader.shape(name) != expected:
                wrong.append(f"{name} has shape {list(reader.shape(name))}, but config.json gives {list(expected)}")
            elif reader.dtype(name).name not in FLOATING:
                wrong.append(
                    f"{name} has dtype {reader.dtype(name).name}; weights must be floating-point, of at least 16 bits"
                )
    if wrong:
        raise UserError(f"{reader.directory}: " + names.some(wrong, 4))


def _load_leaf(
    reader: TensorReader, parameter: Parameter, sources: tuple[str, ...], sharding: NamedSharding, dtype: jnp.dtype
) -> jax.Array:
    shape = parameter.shape
    if not parameter.stacked:
        return _place(shape, sharding, dtype, functools.partial(_read_slice, reader, sources[0]))
    axes = (*sharding.spec, *(None,) * (len(shape) - len(sharding.spec)))
    if axes[0] is not None or math.prod(shape) * dtype.itemsize <= STACKED_ON_HOST:
        return _place(shape, sharding, dtype, functools.partial(_read_stacked, reader, sources))
    layer_sharding = NamedSharding(sharding.mesh, PartitionSpec(*axes[1:]))
    leaf = _allocator(shape, dtype, sharding)()
    for index, name in enumerate(sources):
        layer = _place(shape[1:], layer_sharding, dtype, functools.partial(_read_slice, reader, name))
        leaf = _set_layer(leaf, layer, np.int32(index))
        # Waiting limits the host's copies to one layer; the speed depends on disk and conversion, not on transfers.
        leaf.block_until_ready()
    return leaf


def _place(
    shape: tuple[int, ...],
    sharding: NamedSharding,
    dtype: jnp.dtype,
    read: Callable[[tuple[slice, ...]], np.ndarray],
) -> jax.Array:
    """An array on the devices from a function that reads slices. Always copies, because JAX on CPU would alias the
    file."""
    return jax.make_array_from_callback(shape, sharding, lambda index: cast(read(index or (ALL_ROWS,)), dtype))


def _read_slice(reader: TensorReader, name: str, index: tuple[slice, ...]) -> np.ndarray:
    rows, *rest = index
    return reader.read(name, rows)[(slice(None), *rest)]


def _read_stacked(reader: TensorReader, sources: tuple[str, ...], index: tuple[slice, ...]) -> np.ndarray:
    layers, *rest = index
    return np.stack([_read_slice(reader, name, tuple(rest)) for name in sources[layers]])


@functools.lru_cache(maxsize=64)
def _allocator(shape: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding) -> Callable[[], jax.Array]:
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(leaf: jax.Array, layer: jax.Array, index: jax.Array) -> jax.Array:
    return leaf.at[index].set(layer)


def fingerprint(reader: TensorReader, config: LlamaConfig) -> str:
    """Identifies the weights of a base by names, shapes, dtypes and samples of each tensor, without reading all of
    them.

    A Hugging Face directory and its conversion in the same dtype have the same fingerprint.
    """
    digest = hashlib.sha256(repr(config).encode())
    for path, sources in sorted(match_tensors(reader, config).items()):
        for name in sources:
            digest.update(f"{path} {reader.shape(name)} {reader.dtype(name).name}".encode())
            size = math.prod(reader.shape(name)) * reader.dtype(name).itemsize
            for start in (0, size // 2, max(size - _SAMPLE, 0)):
                digest.update(_sample(reader, name, start))
    return digest.hexdigest()


def _sample(reader: TensorReader, name: str, start: int) -> memoryview:
    """Bytes of a tensor, in row-major order, from `start` on; reads only the rows that contain them."""
    row_bytes = math.prod(reader.shape(name)[1:]) * reader.dtype(name).itemsize
    first, last = start // row_bytes, -(-(start + _SAMPLE) // row_bytes)
    begin = start - first * row_bytes
    return as_bytes(reader.read(name, slice(first, last)))[begin : begin + _SAMPLE]
