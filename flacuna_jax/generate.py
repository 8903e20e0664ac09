"""`flacuna generate --model M [--adapter A] PROMPT ...`: completes prompts with exactly the template of training.

Prompts are arguments, or lines of a file or of standard input. A .jsonl file holds {"prompt": ...} objects, whose
prompts can have several lines.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from flacuna_jax.arguments import (
    Parser,
    add_base_option,
    add_dtype_option,
    add_filter_options,
    add_model_options,
    add_template_option,
)
from flacuna_jax.cli import run_verb
from flacuna_jax.errors import UserError
from flacuna_jax.generation.settings import Decoding, Placement, Sampling


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = parser().parse_args(argv)
    prompts, decoding = _prompts(arguments), _decoding(arguments)
    from flacuna_jax.verbs import generate

    generate.run(arguments, prompts, decoding)
    return None


def _decoding(arguments: argparse.Namespace) -> Decoding:
    if arguments.max_new_tokens < 1 or arguments.batch_size < 1:
        raise UserError("--max-new-tokens and --batch-size must be at least 1")
    if "" in arguments.stop:
        raise UserError("--stop is empty, which would end every answer before its first token")
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    return Decoding(arguments.max_new_tokens, tuple(arguments.stop), sampling, arguments.seed, arguments.system)


def _prompts(arguments: argparse.Namespace) -> list[str]:
    file = arguments.file
    if not arguments.prompts and file is None and not sys.stdin.isatty():
        file = "-"
    if bool(arguments.prompts) == (file is not None):
        raise UserError(
            "give prompts in exactly one of three places: as arguments, in a --file (one per line) or on standard input"
        )
    if file is None:
        return list(arguments.prompts)
    name = "standard input" if file == "-" else f"prompt file {file}"
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name} cannot be read: {error}") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{name} contains no prompt; write one per line")
    if file.endswith(".jsonl"):
        return [_prompt_of(line, f"{file}, line {number}") for number, line in lines]
    return [line for _, line in lines]


def _prompt_of(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, TypeError, KeyError, RecursionError):
        prompt = None
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f'{where}: a line must be an object like {{"prompt": "Why?"}}')
    return prompt


def parser() -> Parser:
    options = Parser("generate", __doc__)
    options.add_argument("prompts", nargs="*", metavar="PROMPT", help="the user's message")
    options.add_argument("--file", metavar="TXT", help="prompts, one per line, or .jsonl; - is standard input")
    add_model_options(options)
    wording = options.add_mutually_exclusive_group()
    add_template_option(wording.add_argument)
    wording.add_argument("--raw", action="store_true", help="no template: continue the prompt as plain text")
    options.add_argument(
        "--task",
        metavar="TEXT",
        help="definition of a task, for the paper's writing prompt that then wraps each prompt",
    )
    options.add_argument("--system", metavar="TEXT", help="system text, replaces that of the template")
    options.add_argument(
        "--max-new-tokens", type=int, default=Decoding.max_new_tokens, metavar="N", help="maximum length of an answer"
    )
    options.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="text that ends an answer; repeatable"
    )
    options.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy")
    add_filter_options(options.add_argument)
    options.add_argument("--batch-size", type=int, default=Placement.rows, metavar="N", help="prompts decoded together")
    add_dtype_option(options.add_argument)
    add_base_option(options)
    options.add_argument("--json", action="store_true", help="one JSON object per line: prompt, answer, tokens, finish")
    return options


if __name__ == "__main__":
    raise SystemExit(run_verb(main))
