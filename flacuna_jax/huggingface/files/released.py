"""The released Flacuna: a training checkpoint of PEFT 0.3 with its int8 base, which no library can load.

The adapter is made of its LoRA factors. Its base is vicuna-13B in the layout of bitsandbytes' LLM.int8 (Dettmers et
al., 2022, arXiv:2208.07339): row-wise absolute-maximum scales `SCB`, W = codes · SCB / 127.
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
"""Values from the published training script; they are not in the checkpoint."""

HALF = np.dtype(np.float16)
_CODES = 127


def released_adapter(reader: CheckpointReader, config: LlamaConfig, alpha: float | None = None) -> Adapter:
    """The LoRA factors of the release, with the alpha and dropout of its training script.

    Args:
      reader: the release, or another checkpoint of that kind.
      config: sizes of its base.
      alpha: for another checkpoint, whose state dict does not have it.

    Raises:
      UserError: a factor is missing, not finite or has the wrong shape, or the rank is not that of the release and
        alpha is not given.
    """
    adapter = read_training_checkpoint(reader, config, alpha=alpha or ALPHA, dropout=DROPOUT, base_name=BASE)
    if alpha is None and adapter.lora.rank != RANK:
        raise UserError(
            f"{reader.directory} has rank {adapter.lora.rank}, but the released Flacuna has {RANK}; the file does not "
            f"have the alpha of its training, so give it with --alpha"
        )
    return adapter


@dataclasses.dataclass(frozen=True)
class DequantisedBase:
    """The base in such a checkpoint, in float16 under its Hugging Face names.

    The adapter was trained on it, including the int8 rounding, so it is not equal to the published Vicuna.
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
        """The tensor or some of its rows in float16, dequantised if it contains codes.

        Raises:
          UserError: codes without matching scales.
        """
        stored = self.checkpoint.read(names.PEFT_PREFIX + name, rows)
        if stored.dtype != np.int8:
            return stored.astype(HALF)
        scales_name = f"{names.PEFT_PREFIX}{name.removesuffix('.weight')}.SCB"
        if scales_name not in self.checkpoint or self.checkpoint.shape(scales_name) != self.shape(name)[:1]:
            raise UserError(
                f"{self.directory}: {name} contains int8 codes, but {scales_name} is missing or has the wrong shape"
            )
        scales = self.checkpoint.read(scales_name, rows).astype(np.float32)
        return (stored.astype(np.float32) * (scales[:, None] / _CODES)).astype(HALF)
