"""`flacuna export RUN OUT --format adapter|merged|gguf`: writes a run as a PEFT adapter, or as a whole model in Hugging
Face's or llama.cpp's form."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from flacuna_jax.arguments import Parser, whole
from flacuna_jax.cli import run_verb
from flacuna_jax.huggingface.forms import SHARD_BYTES, Format, GgufType, StoredDtype


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parser().parse_args(argv)
    from flacuna_jax.verbs.export import Export, export_run

    export_run(Export(**vars(arguments)), print)
    return None


def parser() -> Parser:
    options = Parser("export", "Writes a run as a PEFT adapter, a Hugging Face model or a GGUF file, and verifies it.")
    options.add_argument("run", metavar="RUN", nargs="?", help="output directory of a training run")
    options.add_argument("out", metavar="OUT", help="directory to create")
    options.add_argument("--format", required=True, choices=get_args(Format), help="form of the output")
    options.add_argument(
        "--dtype",
        choices=get_args(StoredDtype),
        help="default: float32 for an adapter, the base's dtype for a merged model",
    )
    options.add_argument(
        "--gguf-type",
        choices=get_args(GgufType),
        help="type of the matrices in a GGUF file; default: bf16 for a base in bfloat16, else f16",
    )
    options.add_argument(
        "--adapter", metavar="DIR", help="without RUN: any PEFT adapter (also hf:NAME), to merge into --model"
    )
    options.add_argument(
        "--model",
        metavar="DIR",
        help="without RUN: the checkpoint to write (also hf:NAME or a GGUF file)",
    )
    options.add_argument(
        "--base-name",
        help="name of the base model in adapter_config.json; default: model.name, or its name on the Hub, or its path",
    )
    options.add_argument(
        "--merge-base",
        choices=("dequantised", "stored"),
        help="for a run with a quantised base: merge into the dequantised weights of training (default), or into "
        "those of the checkpoint, and report how much logits change",
    )
    options.add_argument("--base", metavar="DIR", help="directory of the base model; default: the config's model.path")
    options.add_argument(
        "--step",
        type=int,
        help="step of the checkpoint to export; default: the final adapter, or the newest checkpoint",
    )
    options.add_argument(
        "--push",
        metavar="NAME[@BRANCH]",
        help="then upload OUT to this repository on the Hugging Face Hub, which is created as a private one",
    )
    options.add_argument("--public", action="store_true", help="with --push: create a public repository")
    options.add_argument(
        "--check", choices=("vllm",), action="append", default=[], help="fail if vLLM could not serve the adapter"
    )
    options.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        help="output of `flacuna evaluate` for the model card; default: evaluation in RUN",
    )
    options.add_argument(
        "--golden-tokens",
        type=whole(0),
        default=8,
        metavar="N",
        help="tokens per answer in golden_prompts.json, each of which reads all weights once; 0 omits the file",
    )
    options.add_argument(
        "--shard-bytes", type=whole(1), default=SHARD_BYTES, help="maximum size of a weight file of a merged model"
    )
    return options


if __name__ == "__main__":
    raise SystemExit(run_verb(main))
