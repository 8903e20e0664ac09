"""The Flacuna that was released: a training checkpoint of PEFT 0.3 that no library loads, base in int8 and all.

Its factors are the adapter; its base is vicuna-13B in the layout of bitsandbytes' LLM.int8 (Dettmers et al., 2022,
arXiv:2208.07339): row-wise absolute-maximum scales `SCB`, W = codes · SCB / 127.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface import names
from flacuna_jax.huggingface.adapter import Adapter, read_training_checkpoint
from flacuna_jax.huggingface.files.read import CheckpointReader
from flacuna_jax.huggingface.files.tensors import ALL_ROWS
from flacuna_jax.model.llama import LlamaConfig

BASE = "TheBloke/vicuna-13B-1.1-HF"
RANK, ALPHA, DROPOUT = 8, 16.0, 0.05
"""What the published training script passed; the checkpoint itself does not say."""

HALF = np.dtype(np.float16)
_CODES = 127


def released_adapter(reader: CheckpointReader, config: LlamaConfig, alpha: float | None = None) -> Adapter:
    """The LoRA factors of the release, with the alpha and dropout of its training script.

    Args:
      reader: the release, or another checkpoint of that kind.
      config: sizes of its base.
      alpha: for another one; its state dict does not hold it.

    Raises:
      UserError: a factor is missing, misshapen or not finite, or the rank is not the release's and alpha is not given.
    """
    adapter = read_training_checkpoint(reader, config, alpha=alpha or ALPHA, dropout=DROPOUT, base_name=BASE)
    if alpha is None and adapter.lora.rank != RANK:
        raise UserError(
            f"{reader.directory} has rank {adapter.lora.rank}, the released Flacuna {RANK}; the alpha it was trained "
            f"with is not in the file, give it with --alpha"
        )
    return adapter


@dataclasses.dataclass(frozen=True)
class DequantisedBase:
    """The base inside such a checkpoint, in float16 under its Hugging Face names.

    It is what the adapter was trained on, int8 rounding included, and so not equal to the published Vicuna.
    """

    checkpoint: CheckpointReader

    @property
    def directory(self) -> Path:
        return self.checkpoint.directory

    @property
    def _sources(self) -> Mapping[str, str]:
        stored = (name for name in self.checkpoint if ".lora_" not in name and not name.endswith(".SCB"))
        return {name.removeprefix(names.PEFT_PREFIX): name for name in stored if name.startswith(names.PEFT_PREFIX)}

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __contains__(self, name: object) -> bool:
        return f"{names.PEFT_PREFIX}{name}" in self.checkpoint

    def shape(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.shape(names.PEFT_PREFIX + name)

    def dtype(self, name: str) -> np.dtype:
        return HALF

    def read(self, name: str, rows: slice = ALL_ROWS) -> np.ndarray:
        """The tensor in float16, or some of its rows, dequantised where it holds codes.

        Raises:
          UserError: codes without scales that fit them.
        """
        stored = self.checkpoint.read(names.PEFT_PREFIX + name, rows)
        if stored.dtype != np.int8:
            return stored.astype(HALF)
        scales_name = f"{names.PEFT_PREFIX}{name.removesuffix('.weight')}.SCB"
        if scales_name not in self.checkpoint or self.checkpoint.shape(scales_name) != self.shape(name)[:1]:
            raise UserError(f"{self.directory}: {name} holds int8 codes, but {scales_name} is missing or misshapen")
        scales = self.checkpoint.read(scales_name, rows).astype(np.float32)
        return (stored.astype(np.float32) * (scales[:, None] / _CODES)).astype(HALF)
