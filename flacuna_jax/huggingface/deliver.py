"""Everything that leaves: written beside its target, re-opened, compared, and only then given its name."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flacuna_jax.huggingface import names, native
from flacuna_jax.huggingface.adapter import Adapter
from flacuna_jax.huggingface.adapter_writing import DTYPES, write_adapter_files
from flacuna_jax.huggingface.architecture import CONFIG_FILE, hugging_face_config, read_settings
from flacuna_jax.huggingface.directories import check_target, whole_directory
from flacuna_jax.huggingface.load import fingerprint, match_tensors
from flacuna_jax.huggingface.merged import (
    SHARD_BYTES,
    PendingTensor,
    copy_tokenizer,
    merged_tensors,
    model_tensors,
    write_settings,
    write_shards,
)
from flacuna_jax.huggingface.probe import Weights, probe_ids, stored_weights, streamed_logits
from flacuna_jax.huggingface.read import open_checkpoint
from flacuna_jax.huggingface.tensors import TensorReader, common_dtype
from flacuna_jax.huggingface.verify import (
    compare_logits,
    verify_adapter,
    verify_digests,
    verify_merge,
    verify_model,
)
from flacuna_jax.model.llama import LlamaConfig


@dataclasses.dataclass(frozen=True)
class Delivery:
    """What was written and verified.

    Attributes:
      directory: its final name.
      files: names of the weight files.
      nbytes: size of the weights.
      logit_shift: largest difference of a logit on the probe ids, against what the directory was made from; None where
        it was not asked for.
    """

    directory: Path
    files: tuple[str, ...]
    nbytes: int
    logit_shift: float | None


@dataclasses.dataclass(frozen=True)
class Companions:
    """What a model needs beside its weights.

    Attributes:
      tokenizer: directory whose tokenizer files are copied unchanged.
      chat_template: jinja text for tokenizer_config.json, None to leave that file as it is.
      token_ids: bos_token_id and eos_token_id, for a config.json that does not state them.
    """

    tokenizer: Path
    chat_template: str | None
    token_ids: Mapping[str, int | None]


def write_adapter(
    target: str | Path,
    adapter: Adapter,
    config: LlamaConfig,
    *,
    trained: bool,
    dtype: str = "float32",
    facts: Mapping[str, str] | None = None,
    logits: Callable[[Adapter], np.ndarray] | None = None,
    replace: bool = False,
) -> Delivery:
    """Writes and verifies a PEFT adapter directory.

    Args:
      target: new directory.
      adapter: the run's adapter on the host (`adapter.host_adapter`).
      config: sizes of its base.
      trained: whether a B that is zero throughout is a failure.
      dtype: "float32" or "bfloat16".
      facts: lines for the model card.
      logits: adapter → logits of fixed ids on the run's base; the adapter read back must give the same to 1e-4.
      replace: whether an earlier directory of that name gives way.

    Raises:
      UserError: the target is in the way.
      VerificationError: what was written is not what was meant; nothing is left behind.
    """
    with whole_directory(target, replace=replace) as partial:
        write_adapter_files(partial, adapter, dtype=dtype, facts=facts)
        shift = verify_adapter(partial, config, adapter, trained=trained, dtype=DTYPES[dtype], logits=logits)
    nbytes = sum(value.size for value in adapter.params.values()) * DTYPES[dtype].itemsize
    return Delivery(Path(target), ("adapter_model.safetensors",), nbytes, shift)


def write_merged(
    target: str | Path,
    reader: TensorReader,
    config: LlamaConfig,
    adapter: Adapter | None,
    companions: Companions,
    *,
    dtype: np.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Delivery:
    """Writes and verifies base + adapter as a Hugging Face model; memory needed is one tensor, for the check one layer.

    Raises:
      UserError: the target is in the way, or a tensor is not finite.
      VerificationError: what was written is not what was meant; nothing is left behind.
    """
    tensors = merged_tensors(reader, config, adapter, dtype)
    ids = probe_ids(config)
    with whole_directory(target) as partial:
        digests = write_shards(partial, tensors, shard_bytes)
        _write_settings(partial, config, tensors, reader.directory, companions)
        verify_model(partial, config, tensors, digests)
        meant = streamed_logits(stored_weights(reader, config), config, ids, adapter)
        found = streamed_logits(stored_weights(open_checkpoint(partial), config), config, ids, None)
        shift = verify_merge(partial, meant, found, common_dtype(tensor.dtype for tensor in tensors))
    return _delivery(target, tensors, digests, shift)


def write_model(
    target: str | Path,
    params: Mapping[str, jax.Array],
    config: LlamaConfig,
    companions: Companions,
    *,
    dtype: np.dtype,
    model_source: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    replace: bool = False,
) -> Delivery:
    """Writes and verifies trained weights as a Hugging Face model, one layer at a time from the devices.

    Args:
      params: all base parameters, addressable by this process.
      dtype: of the files.
      model_source: directory whose config.json is carried over; None for a model trained from scratch.

    Raises: as `write_merged`.
    """
    tensors = model_tensors(params, config, dtype)
    ids = probe_ids(config)
    with whole_directory(target, replace=replace) as partial:
        digests = write_shards(partial, tensors, shard_bytes)
        _write_settings(partial, config, tensors, model_source, companions)
        verify_model(partial, config, tensors, digests)
        meant = streamed_logits(_device_weights(params, dtype), config, ids, None)
        found = streamed_logits(stored_weights(open_checkpoint(partial), config), config, ids, None)
        shift = compare_logits(partial, meant, found)
    return _delivery(target, tensors, digests, shift)


def _device_weights(params: Mapping[str, jax.Array], dtype: np.dtype) -> Weights:
    """The run's arrays by our own paths: a mix-up of file names shows in the logits."""

    def weights(path: str, layer: int, rows: slice) -> np.ndarray:
        array = params[path]
        return np.asarray(array[layer, rows] if names.is_stacked(path) else array[rows]).astype(dtype)

    return weights


def _write_settings(
    partial: Path,
    config: LlamaConfig,
    tensors: list[PendingTensor],
    model_source: Path | None,
    companions: Companions,
) -> None:
    write_settings(
        partial,
        config,
        [tensor.dtype for tensor in tensors],
        model_source=model_source,
        tokenizer_source=companions.tokenizer,
        chat_template=companions.chat_template,
        token_ids=companions.token_ids,
    )


def _delivery(target: str | Path, tensors: list[PendingTensor], digests: Mapping[str, str], shift: float) -> Delivery:
    return Delivery(Path(target), tuple(digests), sum(tensor.nbytes for tensor in tensors), shift)


def convert(
    target: str | Path,
    reader: TensorReader,
    config: LlamaConfig,
    *,
    tokenizer_source: Path,
    dtype: np.dtype | None = None,
) -> Delivery:
    """Writes and verifies the native form of a checkpoint; memory needed is one layer of one parameter.

    Args:
      target: new directory.
      reader: the checkpoint.
      config: its architecture.
      tokenizer_source: directory whose tokenizer files are copied unchanged.
      dtype: None keeps the stored dtype.

    Raises:
      UserError: the target is in the way, a tensor is missing, left over, misshapen or not finite.
      VerificationError: what was written is not what was meant; nothing is left behind.
    """
    sources = match_tensors(reader, config)
    check_target(Path(target))
    with whole_directory(target) as partial:
        leaves = {
            path: native.write_parameter(partial, reader, path, tensors, dtype) for path, tensors in sources.items()
        }
        _write_config(partial, reader, config, leaves)
        copy_tokenizer(tokenizer_source, partial, None)
        native.write_manifest(partial, leaves, base_fingerprint=fingerprint(reader, config))
        written = open_checkpoint(partial)
        match_tensors(written, config)
        verify_digests(partial, native.leaf_digests(partial))
    nbytes = sum((Path(target) / entry["file"]).stat().st_size for entry in leaves.values())
    return Delivery(Path(target), tuple(entry["file"] for entry in leaves.values()), nbytes, None)


def _write_config(
    partial: Path, reader: TensorReader, config: LlamaConfig, leaves: Mapping[str, Mapping[str, Any]]
) -> None:
    """The source's config.json unchanged; Meta's files have none."""
    source, target = reader.directory / CONFIG_FILE, partial / CONFIG_FILE
    if source.is_file():
        target.write_bytes(source.read_bytes())
        return
    stored = common_dtype(np.dtype(entry["dtype"]) for entry in leaves.values())
    written = hugging_face_config(config, stored, read_settings(reader.directory))
    target.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
