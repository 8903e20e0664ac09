"""`flacuna convert MODEL OUT`: converts a LLaMA checkpoint of Hugging Face or Meta to the native sharded format."""

from collections.abc import Sequence
from typing import get_args

from flacuna_jax.arguments import Parser
from flacuna_jax.cli import run_verb
from flacuna_jax.huggingface.forms import StoredDtype


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parser().parse_args(argv)
    from flacuna_jax.verbs.convert import Conversion, convert_model

    convert_model(Conversion(**vars(arguments)), print)
    return None


def parser() -> Parser:
    options = Parser(
        "convert",
        "Converts a LLaMA checkpoint of Hugging Face or Meta to the native format.",
    )
    options.add_argument(
        "model",
        metavar="MODEL",
        help="directory with safetensors, .bin or consolidated.*.pth files, a GGUF file, or hf:NAME[@REVISION][:FILE]; "
        "the released Flacuna gives its adapter",
    )
    options.add_argument("out", metavar="OUT", help="directory to create")
    options.add_argument("--delta", metavar="DIR", help="a published delta (also hf:NAME) to add to MODEL, its base")
    options.add_argument(
        "--base", action="store_true", help="from the released Flacuna, convert its int8 base instead of its adapter"
    )
    options.add_argument(
        "--alpha",
        type=float,
        help="LoRA alpha of a training checkpoint like the released Flacuna but with another rank",
    )
    options.add_argument("--tokenizer", metavar="DIR", help="directory of the tokenizer; default: MODEL")
    options.add_argument("--dtype", choices=get_args(StoredDtype), help="dtype to store; default: that of MODEL")
    return options


if __name__ == "__main__":
    raise SystemExit(run_verb(main))
