"""Reads written files again and compares them with the intended content, before a directory gets its final name."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from flacuna_jax.huggingface import names
from flacuna_jax.huggingface.adapter import Adapter, read_adapter
from flacuna_jax.huggingface.architecture import read_architecture
from flacuna_jax.huggingface.files.pieces import file_digest
from flacuna_jax.huggingface.files.read import open_checkpoint
from flacuna_jax.huggingface.files.safetensors_file import read_header
from flacuna_jax.huggingface.files.tensors import StoredTensor, cast
from flacuna_jax.huggingface.merged import PendingTensor
from flacuna_jax.model.llama import LlamaConfig

LOGIT_TOLERANCE = 1e-4


class VerificationError(RuntimeError):
    """The files on disk differ from the intended content; the message names the difference. Never a mistake of the
    user."""


def verify_adapter(
    directory: Path,
    config: LlamaConfig,
    meant: Adapter,
    *,
    trained: bool,
    dtype: np.dtype,
    logits: Callable[[Adapter], np.ndarray] | None,
) -> float | None:
    """Checks an adapter directory against the run's adapter and returns the largest logit difference, if requested.

    Raises:
      VerificationError: settings, names, shapes, values (after rounding to `dtype`) or logits differ, a value is not
        finite, or a trained adapter has a B of only zeros.
    """
    found = read_adapter(directory, config)
    if _settings(found) != _settings(meant) or found.base_name != meant.base_name:
        raise VerificationError(f"{directory}: the settings read back are {found.lora} instead of {meant.lora}")
    if set(found.params) != set(meant.params):
        raise VerificationError(f"{directory}: contains {sorted(found.params)} instead of {sorted(meant.params)}")
    rounded = {path: cast(cast(value, dtype), np.dtype(np.float32)) for path, value in meant.params.items()}
    for path, value in rounded.items():
        if not np.array_equal(found.params[path], value):
            raise VerificationError(f"{directory}: {path} read back differs from what was written")
        if trained and meant.spec.adapters[path].kind == "lora_b" and not np.any(value):
            raise VerificationError(f"{directory}: {path} is still all zeros after training")
    if logits is None:
        return None
    return compare_logits(directory, logits(dataclasses.replace(meant, params=rounded)), logits(found))


def _settings(adapter: Adapter) -> Any:
    """What must be the same. If projections of the base are fused, ranks and alphas are stored for the fused modules,
    and read back as those of each module."""
    if not adapter.spec.config.fused_projections:
        return adapter.lora, adapter.spec.tokens
    ranks = {module: (found.ranks.tolist(), found.scales.tolist()) for module, found in adapter.spec.ranks.items()}
    return ranks, adapter.lora.dropout, adapter.lora.use_dora, adapter.spec.tokens


def compare_logits(directory: Path, meant: np.ndarray, found: np.ndarray) -> float:
    """The largest difference between two sets of logits; `VerificationError` above `LOGIT_TOLERANCE`."""
    difference = float(np.max(np.abs(meant - found)))
    if not difference <= LOGIT_TOLERANCE:
        raise VerificationError(f"{directory}: logits differ by {difference:.2e}, more than {LOGIT_TOLERANCE:.0e}")
    return difference


def verify_merge(directory: Path, meant: np.ndarray, found: np.ndarray, rounded: Collection[np.dtype]) -> float:
    """The largest shift of a logit that merging caused.

    Rounding every weight of a deep network once changes its logits by about a hundred units of roundoff, relative to
    their standard deviation; a wrong scale or a transposed or misplaced factor changes them by their own size. The
    bound is between the two, and at most a quarter of their standard deviation.

    Args:
      directory: for messages.
      meant: logits of the intended model.
      found: logits of the written model.
      rounded: dtypes to which tensors were rounded; the coarsest determines the bound.

    Raises:
      VerificationError: the shift is beyond rounding.
    """
    shift = float(np.max(np.abs(meant - found)))
    unit = max((float(ml_dtypes.finfo(dtype).eps) for dtype in rounded), default=0.0)
    bound = float(np.std(meant) * np.clip(128 * unit, 1e-3, 0.25))
    if not shift <= bound:
        raise VerificationError(
            f"{directory}: merging shifted logits by {shift:.2e}, more than the {bound:.2e} that rounding explains"
        )
    return shift


def verify_model(directory: Path, config: LlamaConfig, meant: Sequence[PendingTensor]) -> None:
    """Checks settings and headers of a written model: architecture, key set, shapes, dtypes, and that the tensors are
    in the order in which they were written, so that each name has its intended values.

    Raises:
      VerificationError: something differs.
    """
    if read_architecture(directory) != config:
        raise VerificationError(f"{directory}: config.json read back gives {read_architecture(directory)}")
    open_checkpoint(directory)
    held = [read_header(file)[0] for file in sorted(directory.glob("*.safetensors"))]
    wanted = {tensor.name: (tensor.shape, tensor.dtype) for tensor in meant}
    found = {name: (tensor.shape, tensor.dtype) for tensors in held for name, tensor in tensors.items()}
    if wanted != found:
        differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise VerificationError(f"{directory}: existence, shape or dtype differ for {names.some(differing)}")
    lying = [name for tensors in held for name in _in_file_order(tensors)]
    misplaced = [name for name, tensor in zip(lying, meant, strict=True) if name != tensor.name]
    if misplaced:
        raise VerificationError(f"{directory}: the headers give {names.some(misplaced)} the values of other tensors")


def _in_file_order(tensors: Mapping[str, StoredTensor]) -> list[str]:
    return sorted(tensors, key=lambda name: tensors[name].offset)


def verify_digest(path: Path, digest: str) -> None:
    """Reads a file again, from the disk, and compares it with the digest taken while it was written.

    Raises:
      VerificationError: they differ.
    """
    if file_digest(path) != digest:
        raise VerificationError(f"{path}: its bytes differ from the written ones; check the disk")
