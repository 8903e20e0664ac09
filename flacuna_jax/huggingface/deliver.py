"""Writes all exports: into a temporary directory that is read back, compared, and only then renamed to the target."""

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface import names
from flacuna_jax.huggingface.adapter import Adapter
from flacuna_jax.huggingface.adapter_writing import DTYPES, write_adapter_files
from flacuna_jax.huggingface.alongside import LogitsAlongside
from flacuna_jax.huggingface.answer_ends import GENERATION_CONFIG
from flacuna_jax.huggingface.architecture import CONFIG_FILE, hugging_face_config, read_settings
from flacuna_jax.huggingface.card import Facts, model_card
from flacuna_jax.huggingface.directories import check_target, whole_directory
from flacuna_jax.huggingface.files import native
from flacuna_jax.huggingface.files.json_file import read_json
from flacuna_jax.huggingface.files.quantised import method_of
from flacuna_jax.huggingface.files.read import open_checkpoint
from flacuna_jax.huggingface.files.tensors import TensorReader, common_dtype
from flacuna_jax.huggingface.forms import SHARD_BYTES
from flacuna_jax.huggingface.golden import Golden, answer, write_golden
from flacuna_jax.huggingface.golden import notes as golden_notes
from flacuna_jax.huggingface.load import fingerprint, match_tensors
from flacuna_jax.huggingface.merged import (
    PendingTensor,
    copy_tokenizer,
    main_dtype,
    merged_tensors,
    model_tensors,
    write_settings,
    write_shards,
)
from flacuna_jax.huggingface.other_encoder import encoder_of
from flacuna_jax.huggingface.probe import Side, Weights, stored_weights
from flacuna_jax.huggingface.tokenizer import NewTokens
from flacuna_jax.huggingface.verify import (
    compare_logits,
    verify_adapter,
    verify_digest,
    verify_merge,
    verify_model,
)
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import base_parameters


@dataclasses.dataclass(frozen=True)
class Delivery:
    """A written and verified directory.

    Attributes:
      directory: its final path.
      files: names of the weight files.
      nbytes: size of the weights.
      logit_shift: largest difference of a logit on the probe ids from the source of the directory; None if it was not
        computed.
      notes: warnings for serving it, a line each.
    """

    directory: Path
    files: tuple[str, ...]
    nbytes: int
    logit_shift: float | None
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> str:
        if self.nbytes > 1e9:
            return f"{self.nbytes / 1e9:.2f} GB"
        return f"{self.nbytes / 1e6:.3g} MB" if self.nbytes > 1e6 else f"{self.nbytes / 1e3:.3g} kB"


@dataclasses.dataclass(frozen=True)
class Companions:
    """Files of a model other than its weights.

    Attributes:
      tokenizer: directory whose tokenizer files are copied unchanged.
      chat_template: Jinja text for tokenizer_config.json; None keeps the template of the directory.
      token_ids: bos_token_id and eos_token_id, for a config.json that does not have them.
      ends: ids of every token that ends an answer, for generation_config.json.
      end: spelling of the token that the template writes after an answer, which becomes eos_token unless the template
        itself refers to eos_token.
      stop_strings: texts that end an answer, for templates whose answers do not end in a token.
      new_tokens: tokens that are added to the tokenizer.
      base_name: name of the base model, for the model card.
      facts: for the model card.
      golden: prompts whose continuations are recorded next to the weights; None records none.
    """

    tokenizer: Path
    chat_template: str | None
    token_ids: Mapping[str, int | None]
    ends: tuple[int, ...] = ()
    end: str | None = None
    stop_strings: tuple[str, ...] = ()
    new_tokens: NewTokens = ()
    base_name: str | None = None
    facts: Facts = dataclasses.field(default_factory=Facts)
    golden: Golden | None = None


def write_adapter(
    target: str | Path,
    adapter: Adapter,
    config: LlamaConfig,
    *,
    trained: bool,
    dtype: str = "float32",
    facts: Facts | None = None,
    tokenizer: Callable[[Path], None] = lambda _: None,
    rules: Callable[[Path], Sequence[str]] = lambda _: (),
    logits: Callable[[Adapter], np.ndarray] | None = None,
    replace: bool = False,
) -> Delivery:
    """Writes and verifies a PEFT adapter directory.

    Args:
      target: new directory.
      adapter: the run's adapter, in host memory.
      config: sizes of its base.
      trained: whether a B of only zeros is an error.
      dtype: "float32" or "bfloat16".
      facts: for the model card.
      tokenizer: writes the files of a tokenizer with new tokens into a directory.
      rules: returns the rules that the written directory violates, for example `vllm_violations`.
      logits: adapter → logits of fixed ids on the run's base; the adapter read back must give the same to 1e-4.
      replace: whether to replace an existing directory of that name.

    Raises:
      UserError: the target already exists, or a rule is violated.
      VerificationError: the written files differ from the intended content; nothing is left behind.
    """
    with whole_directory(target, replace=replace) as partial:
        write_adapter_files(partial, adapter, dtype=dtype, facts=facts)
        tokenizer(partial)
        if violated := list(rules(partial)):
            raise UserError("the adapter cannot be served: " + names.some(violated, 4))
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
    """Writes and verifies base + adapter as a Hugging Face model; needs memory for two or three layers.

    `reader` has the base that the adapter is added to (`Adapter.base`). It is read once: while the merged values are
    written, both the base with its adapter and the merged values go through the network (see `alongside`). Each shard
    is read back from the disk while the next one is written.

    Raises:
      UserError: the target already exists, or a tensor is not finite.
      VerificationError: the written files differ from the intended content; nothing is left behind.
    """
    if adapter is not None:
        reader = adapter.with_rows(reader)
    tensors = merged_tensors(reader, config, adapter, dtype)
    with whole_directory(target) as partial:
        meant, started = Side(stored_weights(reader, config), adapter), time.monotonic()
        files, logits = _write_weights(partial, config, tensors, shard_bytes, meant, reader.directory, companions)
        shift = verify_merge(partial, *logits, [tensor.dtype for tensor in tensors if tensor.rounded])
        lora = None if adapter is None else adapter.lora
        notes = describe(partial, partial, config, companions, lora, shift, time.monotonic() - started)
    return _delivery(target, tensors, files, shift, notes)


def write_model(
    target: str | Path,
    params: Mapping[str, jax.Array],
    config: LlamaConfig,
    companions: Companions,
    *,
    dtype: np.dtype,
    model_source: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    replace: bool = False,
) -> Delivery:
    """Writes and verifies trained weights as a Hugging Face model, one layer at a time from the devices.

    Args:
      params: all base parameters, addressable by this process.
      dtype: of the files.
      model_source: directory whose config.json is copied; None for a model trained from scratch.

    Raises: like `write_merged`.
    """
    tensors = model_tensors(params, config, dtype)
    with whole_directory(target, replace=replace) as partial:
        meant, started = Side(_device_weights(params, config, dtype)), time.monotonic()
        files, logits = _write_weights(partial, config, tensors, shard_bytes, meant, model_source, companions)
        shift = compare_logits(partial, *logits)
        notes = describe(partial, partial, config, companions, None, None, time.monotonic() - started)
    return _delivery(target, tensors, files, shift, notes)


def _write_weights(
    partial: Path,
    config: LlamaConfig,
    tensors: list[PendingTensor],
    shard_bytes: int,
    meant: Side,
    model_source: str | Path | None,
    companions: Companions,
) -> tuple[tuple[str, ...], tuple[np.ndarray, np.ndarray]]:
    """Writes weights and settings, and reads them back. Returns the file names, and the logits of the intended model
    and of the files."""
    with LogitsAlongside(config, meant) as alongside:
        files = _read_back(partial, write_shards(partial, tensors, shard_bytes, alongside.see))
        write_companions(partial, config, main_dtype(tensors), model_source, companions)
        verify_model(partial, config, tensors)
        return files, alongside.both(stored_weights(open_checkpoint(partial), config))


def _read_back(partial: Path, written: Iterable[tuple[str, str]]) -> tuple[str, ...]:
    """Verifies each (file, digest) while the next one is written; returns the names."""
    files = []
    with ThreadPoolExecutor(1) as checker:
        checks = []
        for file, digest in written:
            files.append(file)
            checks.append(checker.submit(verify_digest, partial / file, digest))
        for check in checks:
            check.result()
    return tuple(files)


def _device_weights(params: Mapping[str, jax.Array], config: LlamaConfig, dtype: np.dtype) -> Weights:
    """The run's arrays under our own paths, so that swapped file names change the logits."""
    base = base_parameters(config)

    def weights(path: str, layer: int, rows: slice) -> np.ndarray:
        array = params[path]
        return np.asarray(array[layer, rows] if base[path].stacked else array[rows]).astype(dtype)

    return weights


def write_companions(
    directory: Path,
    config: LlamaConfig,
    dtype: np.dtype,
    model_source: str | Path | None,
    companions: Companions,
) -> None:
    """Writes everything that a model directory has besides weights and card: settings, tokenizer, chat template."""
    write_settings(
        directory,
        config,
        dtype,
        model_source=model_source,
        tokenizer_source=companions.tokenizer,
        chat_template=companions.chat_template,
        token_ids=companions.token_ids,
        ends=companions.ends,
        end=companions.end,
        new_tokens=companions.new_tokens,
    )


def describe(
    partial: Path,
    model: Path,
    config: LlamaConfig,
    companions: Companions,
    lora: LoraConfig | None,
    logit_shift: float | None,
    seconds: float,
    gguf_file: str | None = None,
) -> list[str]:
    """Writes the model card, and the answers of the written weights to golden prompts, to `partial`. `model` is the
    checkpoint directory of the written weights. Each token reads them once more, which takes less than the `seconds` of
    writing and reading them back. Returns notes on encoding prompts."""
    card = model_card(lora, companions.base_name, companions.facts, logit_shift, gguf_file)
    (partial / "README.md").write_text(card, encoding="utf-8")
    if companions.golden is None:
        return []
    companions.golden.announce(companions.golden.count * seconds)
    weights = stored_weights(open_checkpoint(model), config)
    encoder = encoder_of(model)
    records = answer(weights, config, companions.golden, encoder)
    write_golden(partial, records, companions.golden.count)
    return golden_notes(records, encoder)


def _delivery(
    target: str | Path, tensors: list[PendingTensor], files: tuple[str, ...], shift: float, notes: Sequence[str]
) -> Delivery:
    return Delivery(Path(target), files, sum(tensor.nbytes for tensor in tensors), shift, tuple(notes))


def convert(
    target: str | Path,
    reader: TensorReader,
    config: LlamaConfig,
    *,
    tokenizer_source: Path,
    dtype: np.dtype | None = None,
) -> Delivery:
    """Writes and verifies the native form of a checkpoint; needs memory for one layer of one parameter.

    Args:
      target: new directory.
      reader: the checkpoint.
      config: its architecture.
      tokenizer_source: directory whose tokenizer files are copied unchanged.
      dtype: None keeps the stored dtype.

    Raises:
      UserError: the target already exists, or a tensor is missing, unexpected, not finite or has the wrong shape.
      VerificationError: the written files differ from the intended content; nothing is left behind.
    """
    sources = match_tensors(reader, config)
    check_target(Path(target))
    with whole_directory(target) as partial:
        leaves = {}

        def written() -> Iterator[tuple[str, str]]:
            for path, held in sources.items():
                stacked = base_parameters(config)[path].stacked
                leaves[path] = native.write_parameter(partial, reader, path, stacked, held, dtype)
                yield leaves[path]["file"], leaves[path]["digest"]

        files = _read_back(partial, written())
        _write_config(partial, reader, config, leaves)
        copy_tokenizer(tokenizer_source, partial, None)
        if (reader.directory / GENERATION_CONFIG).is_file():
            shutil.copyfile(reader.directory / GENERATION_CONFIG, partial / GENERATION_CONFIG)
        native.write_manifest(partial, leaves, base_fingerprint=fingerprint(reader, config))
        match_tensors(open_checkpoint(partial), config)
    return Delivery(Path(target), files, sum((Path(target) / file).stat().st_size for file in files), None)


def _write_config(
    partial: Path, reader: TensorReader, config: LlamaConfig, leaves: Mapping[str, Mapping[str, Any]]
) -> None:
    """Copies the source's config.json unchanged; for Meta's files, which have none, and for quantised weights, the
    equivalent is written."""
    source, target = reader.directory / CONFIG_FILE, partial / CONFIG_FILE
    if source.is_file() and method_of(read_json(source)) is None:
        target.write_bytes(source.read_bytes())
        return
    stored = common_dtype(np.dtype(entry["dtype"]) for entry in leaves.values())
    written = hugging_face_config(config, stored, read_settings(reader.directory))
    target.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
