"""Completes prompts with exactly the template of training."""

import argparse
import json
from collections.abc import Sequence

from flacuna_jax.evaluation.impact import writing_prompt
from flacuna_jax.generation.chat_model import ChatModel
from flacuna_jax.generation.language_model import Generation
from flacuna_jax.generation.settings import Decoding, Placement
from flacuna_jax.inference import (
    ModelLoader,
    addressed_model,
    dtype_of,
    template_of,
)
from flacuna_jax.say import say_on_stderr

PRINTED_TOGETHER = 32
"""Answers are printed after each group of this many batches, so an interrupted list loses at most one group."""


def run(arguments: argparse.Namespace, prompts: Sequence[str], decoding: Decoding) -> None:
    address, trained = addressed_model(arguments)
    about: list[str] = []
    template = None if arguments.raw else template_of(address, arguments.template, trained, about.append)
    placement = Placement(rows=arguments.batch_size)
    loader = ModelLoader(dtype_of(arguments, about.append), placement=placement, stored_base=arguments.stored_base)
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


def _shown(prompt: str, answer: Generation, as_json: bool, alone: bool) -> str:
    """An answer as printed; it follows its prompt if there are several prompts."""
    if as_json:
        record = {"prompt": prompt, "answer": answer.text, "tokens": answer.tokens, "finish": answer.finish}
        return json.dumps(record, ensure_ascii=False)
    return answer.text if alone else f"> {prompt}\n{answer.text}\n"
