"""Re-opens what was written and compares it with what was meant, before a directory gets its final name."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np

from flacuna_jax.huggingface import names
from flacuna_jax.huggingface.adapter import Adapter, read_adapter
from flacuna_jax.huggingface.architecture import read_architecture
from flacuna_jax.huggingface.merged import PendingTensor
from flacuna_jax.huggingface.pieces import file_digest
from flacuna_jax.huggingface.probe import StreamedModel, Weights, probe_ids
from flacuna_jax.huggingface.read import CheckpointReader, open_checkpoint
from flacuna_jax.huggingface.safetensors_file import read_header
from flacuna_jax.huggingface.tensors import StoredTensor, cast
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import base_shapes

LOGIT_TOLERANCE = 1e-4


class VerificationError(RuntimeError):
    """What lies on the disk is not what was meant to; says in what it differs. Never the user's mistake."""


def verify_adapter(
    directory: Path,
    config: LlamaConfig,
    meant: Adapter,
    *,
    trained: bool,
    dtype: np.dtype,
    logits: Callable[[Adapter], np.ndarray] | None,
) -> float | None:
    """Checks an adapter directory against the run's adapter and returns the largest logit difference, if asked for.

    Raises:
      VerificationError: settings, names, shapes, values (after rounding to `dtype`) or logits differ, a value is not
        finite, or a trained adapter has a B that is zero throughout.
    """
    found = read_adapter(directory, config)
    if found.lora != meant.lora or found.base_name != meant.base_name:
        raise VerificationError(f"{directory}: settings read back are {found.lora}, meant were {meant.lora}")
    if set(found.params) != set(meant.params):
        raise VerificationError(f"{directory}: holds {sorted(found.params)}, meant were {sorted(meant.params)}")
    rounded = {path: cast(cast(value, dtype), np.dtype(np.float32)) for path, value in meant.params.items()}
    for path, value in rounded.items():
        if not np.array_equal(found.params[path], value):
            raise VerificationError(f"{directory}: {path} read back differs from what was written")
        if trained and path.endswith("lora_b") and not np.any(value):
            raise VerificationError(f"{directory}: {path} is zero throughout after training; nothing was learned in it")
    if logits is None:
        return None
    return compare_logits(directory, logits(dataclasses.replace(meant, params=rounded)), logits(found))


def compare_logits(directory: Path, meant: np.ndarray, found: np.ndarray) -> float:
    """The largest difference between two sets of logits; `VerificationError` above `LOGIT_TOLERANCE`."""
    difference = float(np.max(np.abs(meant - found)))
    if not difference <= LOGIT_TOLERANCE:
        raise VerificationError(f"{directory}: logits differ by {difference:.2e}, allowed are {LOGIT_TOLERANCE:.0e}")
    return difference


def verify_merge(directory: Path, meant: np.ndarray, found: np.ndarray, dtype: np.dtype) -> float:
    """The largest shift of a logit that merging caused.

    Rounding every weight of a deep network once to `dtype` moves its logits by about a hundred units of roundoff,
    relative to their spread; a wrong scale or a transposed or misplaced factor moves them by their own size. The bound
    lies between, and never above a quarter of their standard deviation.

    Raises:
      VerificationError: the shift is beyond rounding.
    """
    shift = float(np.max(np.abs(meant - found)))
    bound = float(np.std(meant) * np.clip(128 * float(ml_dtypes.finfo(dtype).eps), 1e-3, 0.25))
    if not shift <= bound:
        raise VerificationError(f"{directory}: merging shifted logits by {shift:.2e}, rounding explains {bound:.2e}")
    return shift


def verify_model(directory: Path, config: LlamaConfig, meant: Sequence[PendingTensor]) -> None:
    """Checks a written model by its settings and headers: architecture, key set, shapes, dtypes.

    Raises:
      VerificationError: something differs.
    """
    if read_architecture(directory) != config:
        raise VerificationError(f"{directory}: config.json read back gives {read_architecture(directory)}")
    reader = open_checkpoint(directory)
    wanted = {tensor.name: (tensor.shape, tensor.dtype) for tensor in meant}
    found = {name: (reader.shape(name), reader.dtype(name)) for name in reader}
    if wanted != found:
        differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise VerificationError(f"{directory}: presence, shape or dtype differ for {names.some(differing)}")


def verify_digest(path: Path, digest: str) -> None:
    """Reads a file again and compares it with the digest taken while it was written.

    Raises:
      VerificationError: they differ.
    """
    if file_digest(path) != digest:
        raise VerificationError(f"{path}: its bytes are not those that were written; check the disk")


class LogitsAlongside:
    """Logits of what is meant and of what is written, made layer by layer while the files appear.

    Both sides are read while the machine still holds them in memory; afterwards a model larger than it would have to
    come from the disk once more for each side.

    Args:
      directory: where safetensors files appear, tensors in the order of the layers.
      config: sizes.
      meant: weights of what the files are made from, and the adapter beside them.
    """

    def __init__(self, directory: Path, config: LlamaConfig, meant: Weights, adapter: Adapter | None) -> None:
        self._directory, self._config = directory, config
        self._tensors: dict[str, StoredTensor] = {}
        self._ids_bt = probe_ids(config)[None]
        slots = self._ids_bt.shape[1]
        written = _written_weights(CheckpointReader(directory, self._tensors))
        self._meant = StreamedModel(meant, config, adapter, batch=1, slots=slots)
        self._found = StreamedModel(written, config, None, batch=1, slots=slots)
        self._layers = -1

    def add(self, file: str) -> None:
        """Goes as far as the files, now one more, allow."""
        self._tensors |= read_header(self._directory / file)[0]
        while self._layers < self._config.num_layers and self._needed() <= self._tensors.keys():
            for side in (self._meant, self._found):
                if self._layers < 0:
                    side.begin(self._ids_bt)
                else:
                    side.through(self._layers)
            self._layers += 1

    def _needed(self) -> set[str]:
        if self._layers < 0:
            return {names.EMBEDDING}
        stacked = (path for path in base_shapes(self._config) if names.is_stacked(path))
        return {names.tensor_name(path, self._layers) for path in stacked}

    def both(self) -> tuple[np.ndarray, np.ndarray]:
        """Logits [tokens, vocab] of what is meant and of what was written.

        Raises:
          VerificationError: layers are missing from the files.
        """
        if self._layers < self._config.num_layers:
            raise VerificationError(f"{self._directory}: layer {self._layers} is not in the files that were written")
        return self._meant.finish()[0], self._found.finish()[0]


def _written_weights(reader: CheckpointReader) -> Weights:
    def weights(path: str, layer: int, rows: slice) -> np.ndarray:
        return reader.read(names.tensor_name(path, layer if names.is_stacked(path) else None), rows)

    return weights
