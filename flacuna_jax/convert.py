"""`flacuna convert MODEL OUT`: a Hugging Face LLaMA checkpoint into the native sharded form, verified."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flacuna_jax.cli import run_verb
from flacuna_jax.huggingface import deliver
from flacuna_jax.huggingface.adapter_writing import DTYPES
from flacuna_jax.huggingface.architecture import read_architecture
from flacuna_jax.huggingface.delta import DeltaReader
from flacuna_jax.huggingface.directories import check_target
from flacuna_jax.huggingface.read import open_checkpoint
from flacuna_jax.huggingface.tensors import TensorReader
from flacuna_jax.huggingface.tokenizer import check_vocabulary, load_tokenizer, tokenizer_files


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = _parser().parse_args(argv)
    target = Path(arguments.out)
    check_target(target)
    reader = _open(arguments)
    config = read_architecture(reader.directory)
    tokenizer = _tokenizer_source(arguments, reader)
    if tokenizer_files(tokenizer):
        check_vocabulary(load_tokenizer(tokenizer), config.vocab_size, tokenizer)
    else:
        print(f"note: {tokenizer} has no tokenizer; training will need model.tokenizer")
    started = time.monotonic()
    dtype = None if arguments.dtype is None else STORED_DTYPES[arguments.dtype]
    written = deliver.convert(target, reader, config, tokenizer_source=tokenizer, dtype=dtype)
    seconds = time.monotonic() - started
    print(
        f"{target}: {len(written.files)} parameters of {config.num_layers} layers, {written.nbytes / 1e9:.2f} GB in "
        f"{seconds:.1f} s, read back and verified. Next: model.path: {target}"
    )
    return None


def _open(arguments: argparse.Namespace) -> TensorReader:
    model = open_checkpoint(arguments.model)
    return model if arguments.delta is None else DeltaReader(model, open_checkpoint(arguments.delta))


def _tokenizer_source(arguments: argparse.Namespace, reader: TensorReader) -> Path:
    """A delta brings its tokenizer; the first publications of v1.1 left it out, its vocabulary being the base's."""
    if not tokenizer_files(reader.directory):
        return Path(arguments.model)
    return reader.directory


STORED_DTYPES = {**DTYPES, "float16": np.dtype(np.float16)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flacuna convert", description="Converts a Hugging Face LLaMA checkpoint into the native sharded form."
    )
    parser.add_argument("model", metavar="MODEL", help="directory with safetensors or pytorch_model*.bin files")
    parser.add_argument("out", metavar="OUT", help="directory to create")
    parser.add_argument("--delta", metavar="DIR", help="a published delta that is added to MODEL, its base")
    parser.add_argument("--dtype", choices=sorted(STORED_DTYPES), help="store in this dtype; default: as in MODEL")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_verb(main))
