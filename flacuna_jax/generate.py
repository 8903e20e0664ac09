"""`flacuna generate --model M [--adapter A] PROMPT ...`: completes prompts with exactly the template of training.

Prompts are arguments, or lines of a file or of standard input. A .jsonl file holds {"prompt": ...} objects, whose
prompts can have several lines.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from flacuna_jax.arguments import Parser
from flacuna_jax.cli import run_verb
from flacuna_jax.errors import UserError
from flacuna_jax.evaluation.impact import writing_prompt
from flacuna_jax.generation.chat_model import ChatModel, Decoding
from flacuna_jax.generation.decode import Sampling
from flacuna_jax.generation.engine import Placement
from flacuna_jax.generation.language_model import Generation
from flacuna_jax.inference import (
    ModelLoader,
    add_base_option,
    add_model_options,
    add_template_option,
    addressed_model,
    template_of,
)
from flacuna_jax.run.setup import say_on_stderr

PRINTED_TOGETHER = 32
"""Answers are printed after each group of this many batches, so an interrupted list loses at most one group."""


def main(argv: Sequence[str] | None = None) -> int | None:
    arguments = _parser().parse_args(argv)
    prompts = _prompts(arguments)
    address, trained = addressed_model(arguments)
    if arguments.max_new_tokens < 1 or arguments.batch_size < 1:
        raise UserError("--max-new-tokens and --batch-size must be at least 1")
    if "" in arguments.stop:
        raise UserError("--stop is empty, which would end every answer before its first token")
    about: list[str] = []
    template = None if arguments.raw else template_of(address, arguments.template, trained, about.append)
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    decoding = Decoding(arguments.max_new_tokens, tuple(arguments.stop), sampling, arguments.seed, arguments.system)
    placement = Placement(rows=arguments.batch_size)
    loader = ModelLoader(arguments.dtype, placement=placement, stored_base=arguments.stored_base)
    model = ChatModel(loader.load(address), template)
    asked = prompts if arguments.task is None else [writing_prompt(arguments.task, prompt) for prompt in prompts]
    requests = model.requests(asked, decoding)
    for line in about:
        say_on_stderr(line)
    size = PRINTED_TOGETHER * arguments.batch_size
    for begin in range(0, len(prompts), size):
        part = slice(begin, begin + size)
        for prompt, answer in zip(prompts[part], model.language_model.generate(requests[part]), strict=True):
            print(_shown(prompt, answer, arguments.json, alone=len(prompts) == 1), flush=True)
    return None


def _shown(prompt: str, answer: Generation, as_json: bool, alone: bool) -> str:
    """An answer as printed; it follows its prompt if there are several prompts."""
    if as_json:
        record = {"prompt": prompt, "answer": answer.text, "tokens": answer.tokens, "finish": answer.finish}
        return json.dumps(record, ensure_ascii=False)
    return answer.text if alone else f"> {prompt}\n{answer.text}\n"


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


def _parser() -> argparse.ArgumentParser:
    parser = Parser("generate", __doc__)
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="the user's message")
    parser.add_argument("--file", metavar="TXT", help="prompts, one per line, or .jsonl; - is standard input")
    add_model_options(parser)
    wording = parser.add_mutually_exclusive_group()
    add_template_option(wording.add_argument)
    wording.add_argument("--raw", action="store_true", help="no template: continue the prompt as plain text")
    parser.add_argument(
        "--task",
        metavar="TEXT",
        help="definition of a task, for the paper's writing prompt that then wraps each prompt",
    )
    parser.add_argument("--system", metavar="TEXT", help="system text, replaces that of the template")
    parser.add_argument("--max-new-tokens", type=int, default=Decoding.max_new_tokens, metavar="N")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="text that ends an answer; repeatable"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=Placement.rows, metavar="N", help="prompts decoded together")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    add_base_option(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object per line: prompt, answer, tokens, finish")
    return parser


if __name__ == "__main__":
    raise SystemExit(run_verb(main))
