"""The weights of a checkpoint as seen by a run with a quantised base: projections are quantised and dequantised."""

import collections
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from flacuna_jax.huggingface.files.tensors import ALL_ROWS, TensorReader, cast, host_device
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.model.quantized import KERNELS, Quantization

_KEPT = 4
"""Number of whole matrices kept in memory, for readers that read a matrix in pieces."""


class RoundedBase:
    """Reads like the checkpoint, but with its projections rounded by quantisation.

    Args:
      base: the checkpoint.
      config: its architecture.
      quantization: the quantisation of the run.
      dtype: the run's compute dtype, in which weights are quantised and dequantised.
    """

    def __init__(self, base: TensorReader, config: LlamaConfig, quantization: Quantization, dtype: np.dtype) -> None:
        spec = ModelSpec(config, quantization=quantization)
        quantised = (parameter for path, parameter in spec.base.items() if path not in spec.held)
        self._quantised = frozenset(name for parameter in quantised for name in parameter.tensors)
        self._base, self._kernel, self._dtype = base, KERNELS[quantization], dtype
        self._whole: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()
        self._lock = threading.Lock()

    @property
    def directory(self) -> Path:
        return self._base.directory

    def __iter__(self) -> Iterator[str]:
        return iter(self._base)

    def __contains__(self, name: object) -> bool:
        return name in self._base

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def dtype(self, name: str) -> np.dtype:
        return self._base.dtype(name)

    def read(self, name: str, rows: slice = ALL_ROWS) -> np.ndarray:
        """Some rows, in the stored dtype; those of a projection after quantising and dequantising."""
        if name not in self._quantised:
            return self._base.read(name, rows)
        with self._lock:  # a whole matrix is rounded once, when the first piece of it is requested
            if name not in self._whole:
                self._whole[name] = self._rounded(name)
                while len(self._whole) > _KEPT:
                    self._whole.popitem(last=False)
            return self._whole[name][rows]

    def _rounded(self, name: str) -> np.ndarray:
        with jax.default_device(host_device()):
            kernel = self._kernel(jnp.asarray(cast(self._base.read(name), self._dtype)))
            value = kernel.dequantized((None, None), jnp.dtype(self._dtype))
        return cast(np.asarray(value), self._base.dtype(name))
