"""`flacuna convert MODEL OUT`: converts a LLaMA checkpoint of Hugging Face or Meta to the native sharded format."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flacuna_jax.arguments import Parser
from flacuna_jax.cli import run_verb
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface import deliver, names
from flacuna_jax.huggingface.adapter_writing import DTYPES
from flacuna_jax.huggingface.architecture import read_architecture
from flacuna_jax.huggingface.card import Facts
from flacuna_jax.huggingface.directories import check_target
from flacuna_jax.huggingface.files.delta import DeltaReader
from flacuna_jax.huggingface.files.meta import is_meta
from flacuna_jax.huggingface.files.read import CheckpointReader, open_checkpoint
from flacuna_jax.huggingface.files.released import BASE, DequantisedBase, released_adapter
from flacuna_jax.huggingface.files.tensors import TensorReader
from flacuna_jax.huggingface.tokenizer import check_vocabulary, load_tokenizer, tokenizer_files


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = _parser().parse_args(argv)
    check_target(Path(arguments.out))
    model = open_checkpoint(arguments.model, once=True)
    if names.is_training_checkpoint(model):
        if arguments.delta is not None:
            raise UserError(f"--delta: {arguments.model} is a training checkpoint, not the base of a delta")
        if arguments.base:
            _convert_model(arguments, DequantisedBase(model))
        else:
            _extract_adapter(arguments, model)
        return None
    if arguments.base or arguments.alpha is not None:
        raise UserError(
            f"--base and --alpha apply only to the released Flacuna, and {arguments.model} is not that checkpoint"
        )
    delta = None if arguments.delta is None else open_checkpoint(arguments.delta, once=True)
    _convert_model(arguments, model if delta is None else DeltaReader(model, delta))
    return None


def _convert_model(arguments: argparse.Namespace, reader: TensorReader) -> None:
    config = read_architecture(reader.directory)
    tokenizer = _tokenizer_source(arguments, reader)
    if tokenizer_files(tokenizer):
        check_vocabulary(load_tokenizer(tokenizer), config.vocab_size, tokenizer)
    else:
        print(f"note: {tokenizer} has no tokenizer; set model.tokenizer for training")
    started = time.monotonic()
    dtype = None if arguments.dtype is None else STORED_DTYPES[arguments.dtype]
    written = deliver.convert(arguments.out, reader, config, tokenizer_source=tokenizer, dtype=dtype)
    seconds = time.monotonic() - started
    print(
        f"{arguments.out}: {len(written.files)} parameters of {config.num_layers} layers, "
        f"{written.size} in {seconds:.1f} s, read back and verified. Next, set model.path: {arguments.out}"
    )


def _extract_adapter(arguments: argparse.Namespace, model: CheckpointReader) -> None:
    config = read_architecture(arguments.model)
    adapter = released_adapter(model, config, arguments.alpha)
    facts = Facts({"taken from": f"the training checkpoint {Path(arguments.model).name}"})
    deliver.write_adapter(arguments.out, adapter, config, trained=True, facts=facts)
    tensors = sum(len(value) for value in adapter.params.values())
    print(
        f"{arguments.model} is a training checkpoint of PEFT, as Flacuna was released. {arguments.out}: its {tensors} "
        f"LoRA tensors as a PEFT adapter of rank {adapter.lora.rank}, alpha {adapter.lora.alpha:g}, for {BASE}"
    )


def _tokenizer_source(arguments: argparse.Namespace, reader: TensorReader) -> Path:
    """The directory of the tokenizer. A delta normally includes one; the first releases of v1.1 did not, because they
    use the vocabulary of the base. Meta's releases have one tokenizer.model next to the directories of all sizes."""
    if arguments.tokenizer is not None:
        if not tokenizer_files(arguments.tokenizer):
            raise UserError(
                f"--tokenizer {arguments.tokenizer}: the directory has no tokenizer.model or tokenizer.json"
            )
        return Path(arguments.tokenizer)
    places = [reader.directory, Path(arguments.model)]
    if is_meta(places[1]):
        places.append(places[1].resolve().parent)
    return next((place for place in places if tokenizer_files(place)), reader.directory)


STORED_DTYPES = {**DTYPES, "float16": np.dtype(np.float16)}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "convert",
        "Converts a LLaMA checkpoint of Hugging Face or Meta to the native format.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="directory with safetensors, .bin or consolidated.*.pth files; the released Flacuna gives its adapter",
    )
    parser.add_argument("out", metavar="OUT", help="directory to create")
    parser.add_argument("--delta", metavar="DIR", help="a published delta to add to MODEL, its base")
    parser.add_argument(
        "--base", action="store_true", help="from the released Flacuna, convert its int8 base instead of its adapter"
    )
    parser.add_argument(
        "--alpha",
        type=float,
        help="LoRA alpha of a training checkpoint like the released Flacuna but with another rank",
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="directory of the tokenizer; default: MODEL")
    parser.add_argument("--dtype", choices=sorted(STORED_DTYPES), help="dtype to store; default: that of MODEL")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_verb(main))
