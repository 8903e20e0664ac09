"""`flacuna generate --model M [--adapter A] PROMPT ...`: completes prompts with exactly the template of training."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from flacuna_jax.cli import run_verb
from flacuna_jax.config_files import load_config
from flacuna_jax.data.conversation import TEMPLATES, Template, Turn
from flacuna_jax.data.tokenization import Tokenizer, tokenize_prompt
from flacuna_jax.errors import UserError
from flacuna_jax.evaluation.flax_model import LlamaLanguageModel
from flacuna_jax.inference import ModelAddress, ModelLoader
from flacuna_jax.model import decode
from flacuna_jax.model.decode import Sampling

DEFAULT_TEMPLATE = "vicuna_v1.1"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How prompts are worded and answers are made."""

    template: Template | None = TEMPLATES[DEFAULT_TEMPLATE]
    """None takes the prompt as it is, after BOS."""
    max_new_tokens: int = 256
    sampling: Sampling = decode.GREEDY
    seed: int = 0
    batch_size: int = 16


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = _parser().parse_args(argv)
    prompts = _prompts(arguments)
    address, run_template = _model(arguments)
    if arguments.max_new_tokens < 1 or arguments.batch_size < 1:
        raise UserError("--max-new-tokens and --batch-size are at least 1")
    settings = Settings(
        None if arguments.raw else TEMPLATES[arguments.template or run_template],
        arguments.max_new_tokens,
        Sampling(arguments.temperature, arguments.top_k, arguments.top_p),
        arguments.seed,
        arguments.batch_size,
    )
    answers = complete(ModelLoader(arguments.dtype).load(address), prompts, settings)
    for prompt, answer in zip(prompts, answers, strict=True):
        print(json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False) if arguments.json else answer)
    return None


def complete(model: LlamaLanguageModel, prompts: Sequence[str], settings: Settings) -> list[str]:
    """The model's answers, in the order of the prompts.

    Raises:
      UserError: a prompt is empty, or leaves no room for `max_new_tokens` in the model's context.
    """
    tokenizer = model.tokenizer
    with jax.set_mesh(model.mesh):
        continuations = decode.generate(
            model.spec,
            model.params,
            [_encode(prompt, settings.template, tokenizer) for prompt in prompts],
            max_new_tokens=settings.max_new_tokens,
            stop_ids={tokenizer.eos_id},
            sampling=settings.sampling,
            seed=settings.seed,
            batch_size=settings.batch_size,
        )
    stop_strings = settings.template.stop_strings if settings.template else ()
    return [_before_stop(tokenizer.decode(tokens), stop_strings) for tokens in continuations]


def _encode(prompt: str, template: Template | None, tokenizer: Tokenizer) -> list[int]:
    if template is None:
        return [tokenizer.bos_id, *tokenizer.encode(prompt)]
    return tokenize_prompt((Turn("user", prompt),), template, tokenizer)


def _before_stop(text: str, stop_strings: Sequence[str]) -> str:
    ends = [at for at in (text.find(stop) for stop in stop_strings) if at >= 0]
    return text[: min(ends)] if ends else text


def _prompts(arguments: argparse.Namespace) -> list[str]:
    if bool(arguments.prompts) == (arguments.file is not None):
        raise UserError("give prompts as arguments or in a --file (one per line), one of the two")
    if arguments.file is None:
        return list(arguments.prompts)
    try:
        text = sys.stdin.read() if arguments.file == "-" else Path(arguments.file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt file {arguments.file} cannot be read: {error}") from None
    prompts = [line for line in text.split("\n") if line.strip()]
    if not prompts:
        raise UserError(f"prompt file {arguments.file} holds no prompt; write one per line")
    return prompts


def _model(arguments: argparse.Namespace) -> tuple[ModelAddress, str]:
    """Where the model is, and the name of the template that it was trained with."""
    if (arguments.model is None) == (arguments.run is None) or (arguments.run and arguments.adapter):
        raise UserError("say which model: --model DIR, --model DIR --adapter DIR, or --run DIR")
    if arguments.run is None:
        return ModelAddress(
            Path(arguments.model), Path(arguments.adapter) if arguments.adapter else None
        ), DEFAULT_TEMPLATE
    run = Path(arguments.run)
    if not (run / "config.yaml").is_file():
        raise UserError(f"{run} has no config.yaml; the output directory of a training run is expected")
    config = load_config(run / "config.yaml")
    if config.lora is None:
        return ModelAddress(_finished(run, "model")), config.data.template
    return ModelAddress(Path(str(config.model.path)), _finished(run, "adapter")), config.data.template


def _finished(run: Path, product: str) -> Path:
    if not (run / product).is_dir():
        raise UserError(
            f"{run} has no {product}/ yet; it is written when training ends (continue it, or `flacuna export`)"
        )
    return run / product


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flacuna generate", description="Completes prompts with exactly the template of training."
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="what the user says")
    parser.add_argument("--file", metavar="TXT", help="prompts, one per line; - reads standard input")
    parser.add_argument("--model", metavar="DIR", help="a Hugging Face directory or a converted one")
    parser.add_argument("--adapter", metavar="DIR", help="a PEFT adapter on that model, or the run that made one")
    parser.add_argument("--run", metavar="DIR", help="a training run: its base, its adapter and its template")
    wording = parser.add_mutually_exclusive_group()
    wording.add_argument("--template", choices=sorted(TEMPLATES), help=f"default: the run's, or {DEFAULT_TEMPLATE}")
    wording.add_argument("--raw", action="store_true", help="no template: continue the text itself")
    parser.add_argument("--max-new-tokens", type=int, default=Settings.max_new_tokens, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--batch-size", type=int, default=Settings.batch_size, metavar="N", help="prompts decoded together"
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--json", action="store_true", help="one JSON object per line: prompt and answer")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_verb(main))
