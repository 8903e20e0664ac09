"""Whole models in Hugging Face's layout, written tensor by tensor: base plus adapter, or trained weights."""

import collections
import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface import names
from flacuna_jax.huggingface.adapter import Adapter
from flacuna_jax.huggingface.architecture import generation_config, hugging_face_config, read_settings
from flacuna_jax.huggingface.chat_template import read_chat_template
from flacuna_jax.huggingface.files.json_file import read_json
from flacuna_jax.huggingface.files.read import SAFETENSORS, SAFETENSORS_INDEX
from flacuna_jax.huggingface.files.safetensors_file import write_file
from flacuna_jax.huggingface.files.tensors import TensorReader, cast, is_finite, overflow, row_blocks
from flacuna_jax.huggingface.forms import SHARD_BYTES
from flacuna_jax.huggingface.load import match_tensors
from flacuna_jax.huggingface.tokenizer import TEMPLATES, NewTokens, copy_new_tokens, tokenizer_files
from flacuna_jax.huggingface.tokenizer_settings import CONFIG, read_tokenizer_settings
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import base_parameters


@dataclasses.dataclass(frozen=True)
class PendingTensor:
    """A tensor whose rows are computed when they are written.

    Attributes:
      rounded: whether its values are rounded to its dtype; False for a copy.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[slice], np.ndarray]
    rounded: bool = True

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def merged_tensors(
    reader: TensorReader, config: LlamaConfig, adapter: Adapter | None, dtype: np.dtype | None = None
) -> list[PendingTensor]:
    """The tensors of base + adapter: W + scale · B A added in float32 and rounded once to the stored dtype.

    Args:
      reader: the base.
      config: its architecture.
      adapter: the adapter to merge; None copies the base.
      dtype: None keeps each tensor's stored dtype.
    """
    sources = match_tensors(reader, config)

    def pending(path: str, layer: int | None) -> PendingTensor:
        parameter, source = base_parameters(config)[path], sources[path][layer or 0]
        stored = dtype or reader.dtype(source)
        module = path.rpartition("/")[0] if parameter.kind == "matrix" else None
        make = _merger(reader, source, stored, adapter, module, layer or 0)
        merged = adapter is not None and module is not None and (layer or 0) in adapter.layers_of(module)
        rounded = merged or stored != reader.dtype(source)
        return PendingTensor(parameter.stored(layer), reader.shape(source), stored, make, rounded)

    return _stored(config, pending)


def main_dtype(tensors: Sequence[PendingTensor]) -> np.dtype:
    """The dtype of most values. Norms and tables of a model may have another dtype than its projections."""
    counts: collections.Counter[np.dtype] = collections.Counter()
    for tensor in tensors:
        counts[tensor.dtype] += math.prod(tensor.shape)
    return counts.most_common(1)[0][0]


def _merger(
    reader: TensorReader, source: str, dtype: np.dtype, adapter: Adapter | None, module: str | None, layer: int
) -> Callable[[slice], np.ndarray]:
    def make(rows: slice) -> np.ndarray:
        weight = reader.read(source, rows)
        if adapter is not None and module is not None:
            return adapter.merge(weight, module, layer, rows, dtype)
        return weight if weight.dtype == dtype else cast(weight, dtype)

    return make


def model_tensors(params: Mapping[str, jax.Array], config: LlamaConfig, dtype: np.dtype) -> list[PendingTensor]:
    """The tensors of a trained model, rounded to `dtype` and fetched from the devices some rows at a time."""
    base = base_parameters(config)

    def pending(path: str, layer: int | None) -> PendingTensor:
        make = _fetcher(params[path], dtype, layer)
        return PendingTensor(base[path].stored(layer), base[path].layer_shape, dtype, make)

    return _stored(config, pending)


def _stored(config: LlamaConfig, pending: Callable[[str, int | None], PendingTensor]) -> list[PendingTensor]:
    """The tensors of files, from one layer of a parameter each."""
    return [
        _joined([pending(part.path, part.layer) for part in parts]) for parts in names.stored_parts(config).values()
    ]


def _joined(parts: Sequence[PendingTensor]) -> PendingTensor:
    """The rows of all parts in one tensor."""
    if len(parts) == 1:
        return parts[0]
    stops = np.cumsum([part.shape[0] for part in parts]).tolist()

    def make(rows: slice) -> np.ndarray:
        made = []
        for part, stop in zip(parts, stops, strict=True):
            start = stop - part.shape[0]
            if rows.start < stop and start < rows.stop:
                made.append(part.make(slice(max(rows.start, start) - start, min(rows.stop, stop) - start)))
        return made[0] if len(made) == 1 else np.concatenate(made)

    rounded = any(part.rounded for part in parts)
    return dataclasses.replace(parts[0], shape=(stops[-1], *parts[0].shape[1:]), make=make, rounded=rounded)


def _fetcher(array: jax.Array, dtype: np.dtype, layer: int | None) -> Callable[[slice], np.ndarray]:
    return lambda rows: cast(np.asarray(array[rows] if layer is None else array[layer, rows]), dtype)


See = Callable[[str, slice, np.ndarray], None]
"""Called with (tensor, rows, values) before they are written, in several threads and not exactly in file order."""


def write_shards(
    directory: Path, tensors: Sequence[PendingTensor], shard_bytes: int = SHARD_BYTES, see: See | None = None
) -> Iterator[tuple[str, str]]:
    """Writes the tensors into one file, or into shards with an index; yields (file, digest) after each file.

    Raises:
      UserError: a tensor is not finite (the base is damaged, or training diverged).
    """
    shards = _plan_shards(tensors, shard_bytes)
    if len(shards) == 1:
        yield SAFETENSORS, _write_shard(directory / SAFETENSORS, shards[0], see)
        return
    files = [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        yield file, _write_shard(directory / file, shard, see)
    weight_map = {tensor.name: file for file, shard in zip(files, shards, strict=True) for tensor in shard}
    total = {"total_size": sum(tensor.nbytes for tensor in tensors)}
    index = {"metadata": total, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(directory / SAFETENSORS_INDEX, index)


def _plan_shards(tensors: Sequence[PendingTensor], shard_bytes: int) -> list[list[PendingTensor]]:
    shards: list[list[PendingTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def _write_shard(path: Path, tensors: Sequence[PendingTensor], see: See | None) -> str:
    described = [(tensor.name, tensor.shape, tensor.dtype) for tensor in tensors]
    makers = (
        functools.partial(_checked, tensor, rows, see)
        for tensor in tensors
        for rows in row_blocks(tensor.shape, tensor.dtype.itemsize)
    )
    return write_file(path, described, makers)


def _checked(tensor: PendingTensor, rows: slice, see: See | None) -> np.ndarray:
    value = tensor.make(rows)
    made, due = (value.shape, value.dtype), ((rows.stop - rows.start, *tensor.shape[1:]), tensor.dtype)
    assert made == due, f"{tensor.name}: {made} instead of {due}"
    if not is_finite(value):
        why = overflow(value) or "; the base is damaged, or training diverged"
        raise UserError(f"{tensor.name} contains infinities or NaNs{why}")
    if see is not None:
        see(tensor.name, rows, value)
    return value


def write_settings(
    directory: Path,
    config: LlamaConfig,
    dtype: np.dtype,
    *,
    model_source: str | Path | None,
    tokenizer_source: Path,
    chat_template: str | None,
    token_ids: Mapping[str, int | None],
    ends: Sequence[int] = (),
    end: str | None = None,
    new_tokens: NewTokens = (),
) -> None:
    """Writes everything other than the weights: config.json, generation_config.json, tokenizer files.

    Args:
      directory: the target.
      config: sizes.
      dtype: of most of the weights.
      model_source: the base's directory, whose config.json is copied; None for a model trained from scratch.
      tokenizer_source: directory whose tokenizer files are copied unchanged.
      chat_template: Jinja text to write into tokenizer_config.json, whose other keys are kept.
      token_ids: bos_token_id and eos_token_id of the tokenizer, for a config.json that does not have them.
      ends: ids of every token that ends an answer; () uses the eos_token_id of config.json.
      end: spelling of the token that the template writes after an answer.
      new_tokens: tokens that are added to those of `tokenizer_source`.
    """
    source = read_settings(model_source) if model_source else None
    written = hugging_face_config(config, dtype, source, **token_ids)
    _write_json(directory / "config.json", written)
    _write_json(directory / "generation_config.json", generation_config(written, ends))
    copy_tokenizer(tokenizer_source, directory, chat_template, end, new_tokens)


def copy_tokenizer(
    source: Path, directory: Path, chat_template: str | None, end: str | None = None, new_tokens: NewTokens = ()
) -> None:
    """Copies tokenizer files byte by byte; only tokenizer_config.json changes, unless there are new tokens.

    Args:
      source: The directory of the files.
      directory: The target.
      chat_template: Replaces the source's template. None keeps it.
      end: The token that ends an answer. It becomes eos_token, at which servers stop, unless the template writes
        eos_token, which would then become another token.
      new_tokens: Tokens that are added.
    """
    replaced = () if chat_template is None else (CONFIG, *TEMPLATES)
    for path in tokenizer_files(source):
        if path.name not in replaced:
            shutil.copyfile(path, directory / path.name)
    found = read_chat_template(source)
    text = chat_template or "".join(found.sources.values() if found else ())
    present = (source / CONFIG).is_file()
    changes: dict[str, Any] = {}
    settings = read_json(source / CONFIG) if present else _LLAMA_TOKENIZER
    if chat_template is not None:
        changes["chat_template"] = chat_template
    if end is not None and "eos_token" not in text and read_tokenizer_settings(source).spelled("eos") != end:
        changes["eos_token"] = end
    if changes or (new_tokens and not present):
        _write_json(directory / CONFIG, {**settings, **changes})
    copy_new_tokens(source, directory, new_tokens)


_LLAMA_TOKENIZER: dict[str, Any] = {
    "tokenizer_class": "LlamaTokenizer",
    "legacy": True,
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "clean_up_tokenization_spaces": False,
}
"""The settings that transformers assumes for LLaMA's tokenizer.model without a tokenizer_config.json."""


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
