"""Converts a LLaMA checkpoint of Hugging Face or Meta to the native sharded format."""

import dataclasses
import time
from pathlib import Path
from typing import get_args

import numpy as np

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface import deliver, names
from flacuna_jax.huggingface.architecture import read_architecture
from flacuna_jax.huggingface.card import Facts
from flacuna_jax.huggingface.directories import check_target
from flacuna_jax.huggingface.files.delta import DeltaReader
from flacuna_jax.huggingface.files.meta import is_meta
from flacuna_jax.huggingface.files.place import local_checkpoint
from flacuna_jax.huggingface.files.read import CheckpointReader, note_on_quantisation, open_checkpoint
from flacuna_jax.huggingface.files.released import BASE, DequantisedBase, released_adapter
from flacuna_jax.huggingface.files.tensors import TensorReader
from flacuna_jax.huggingface.forms import StoredDtype
from flacuna_jax.huggingface.tokenizer import check_vocabulary, load_tokenizer, tokenizer_files
from flacuna_jax.say import Say


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What `convert_model` writes."""

    model: str
    """A checkpoint in Hugging Face's or Meta's form, or the released Flacuna's training checkpoint: a directory, or
    hf:NAME[@REVISION]."""
    out: str
    """Directory to create."""
    delta: str | None = None
    """A published delta to add to `model`."""
    base: bool = False
    """For the released Flacuna: write its int8 base, not its adapter."""
    alpha: float | None = None
    """For a training checkpoint like that one with another rank."""
    tokenizer: str | None = None
    """Directory of the tokenizer, if it is not in `model`."""
    dtype: StoredDtype | None = None
    """Of the weights in the files. None: as they are in `model`."""


def convert_model(conversion: Conversion, say: Say = lambda _: None) -> None:
    """Writes a checkpoint in the native form, reads it back and compares every byte.

    Raises:
      UserError: the checkpoint or `out` is not usable.
    """
    check_target(Path(conversion.out))
    model = open_checkpoint(conversion.model, once=True)
    if names.is_training_checkpoint(model):
        if conversion.delta is not None:
            raise UserError(f"--delta: {conversion.model} is a training checkpoint, not the base of a delta")
        if conversion.base:
            _convert_model(conversion, say, DequantisedBase(model))
        else:
            _extract_adapter(conversion, say, model)
        return
    if conversion.base or conversion.alpha is not None:
        raise UserError(
            f"--base and --alpha apply only to the released Flacuna, and {conversion.model} is not that checkpoint"
        )
    delta = None if conversion.delta is None else open_checkpoint(conversion.delta, once=True)
    _convert_model(conversion, say, model if delta is None else DeltaReader(model, delta))


def _convert_model(conversion: Conversion, say: Say, reader: TensorReader) -> None:
    config = read_architecture(reader.directory)
    tokenizer = _tokenizer_source(conversion, reader)
    if tokenizer_files(tokenizer):
        check_vocabulary(load_tokenizer(tokenizer), config.vocab_size, tokenizer)
    else:
        say(f"note: {tokenizer} has no tokenizer; set model.tokenizer for training")
    if note := note_on_quantisation(reader.directory):
        say(f"note: {note}")
    started = time.monotonic()
    dtype = None if conversion.dtype is None else STORED_DTYPES[conversion.dtype]
    written = deliver.convert(conversion.out, reader, config, tokenizer_source=tokenizer, dtype=dtype)
    seconds = time.monotonic() - started
    say(
        f"{conversion.out}: {len(written.files)} parameters of {config.num_layers} layers, "
        f"{written.size} in {seconds:.1f} s, read back and verified. Next, set model.path: {conversion.out}"
    )


def _extract_adapter(conversion: Conversion, say: Say, model: CheckpointReader) -> None:
    config = read_architecture(conversion.model)
    adapter = released_adapter(model, config, conversion.alpha)
    facts = Facts({"taken from": f"the training checkpoint {Path(conversion.model).name}"})
    deliver.write_adapter(conversion.out, adapter, config, trained=True, facts=facts)
    tensors = sum(len(value) for value in adapter.params.values())
    say(
        f"{conversion.model} is a training checkpoint of PEFT, as Flacuna was released. {conversion.out}: its "
        f"{tensors} LoRA tensors as a PEFT adapter of rank {adapter.lora.rank}, alpha {adapter.lora.alpha:g}, for "
        f"{BASE}"
    )


def _tokenizer_source(conversion: Conversion, reader: TensorReader) -> Path:
    """The directory of the tokenizer. A delta normally includes one; the first releases of v1.1 did not, because they
    use the vocabulary of the base. Meta's releases have one tokenizer.model next to the directories of all sizes."""
    if conversion.tokenizer is not None:
        if not tokenizer_files(conversion.tokenizer):
            raise UserError(
                f"--tokenizer {conversion.tokenizer}: the directory has no tokenizer.model or tokenizer.json"
            )
        return local_checkpoint(conversion.tokenizer, weights=False)
    places = [reader.directory, local_checkpoint(conversion.model)]
    if is_meta(places[1]):
        places.append(places[1].resolve().parent)
    return next((place for place in places if tokenizer_files(place)), reader.directory)


STORED_DTYPES: dict[StoredDtype, np.dtype] = {name: np.dtype(name) for name in get_args(StoredDtype)}
