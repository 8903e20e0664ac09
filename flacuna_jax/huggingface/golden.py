"""`golden_prompts.json`: answers of a merged model, so that a server of it can be compared with training.

Each record has the user's message, the prompt as text (without BOS if the tokenizer adds it), the ids of training, and
the greedy continuation of the written files in float32. transformers or tokenizers, not our own encoder, test whether a
server gets the same ids from the message and from the text. The margins show how clear each choice was: if the two most
likely tokens are close, a server in half precision may choose the other one.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flacuna_jax.data.conversation import Template, TemplateRefusal, Turn, render_prompt, render_text
from flacuna_jax.data.tokenization import Tokenizer, tokenize_prompt
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.files.json_file import read_json
from flacuna_jax.huggingface.other_encoder import OtherEncoder
from flacuna_jax.huggingface.probe import Weights, streamed_greedy
from flacuna_jax.model.llama import LlamaConfig

FILE = "golden_prompts.json"
CLOSE = 0.1
"""With a margin below this, rounding in half precision may change the choice."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The user's message, the whole prompt as text, and the ids of training."""

    message: str
    text: str
    ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Golden:
    """The prompts, the length of the answers, and how to decode them.

    Attributes:
      ends: tokens that end an answer.
      decode: ids → text.
      announce: called before the answers are generated, with the approximate maximum time in seconds.
    """

    prompts: tuple[Prompt, ...]
    count: int
    ends: tuple[int, ...]
    decode: Callable[[Sequence[int]], str]
    announce: Callable[[float], None] = lambda seconds: None


QUESTIONS = ("Why is the sky blue?", "Name three colours.", "Write one sentence about rain.")
"""Questions of the golden prompts; short, because the exporting machine answers them with the written model."""


def golden_prompts(
    template: Template,
    tokenizer: Tokenizer,
    config: LlamaConfig,
    ends: tuple[int, ...],
    count: int,
    say: Callable[[str], None],
) -> Golden | None:
    """The golden prompts of a model, with answers of `count` tokens; None if `count` is 0 or none fits the context.

    Raises UserError if the template does not support them.
    """
    prompts = []
    for question in QUESTIONS if count else ():
        turns = (Turn("user", question),)
        try:
            ids = tokenize_prompt(turns, template, tokenizer)
        except TemplateRefusal as refusal:
            raise UserError(f"golden prompts: {refusal}; --golden-tokens 0 leaves them out") from None
        if len(ids) + count <= config.context_length:
            text = render_text(render_prompt(turns, template))
            added = "".join(tokenizer.special.spellings[token] for token in tokenizer.prefix_ids)
            prompts.append(Prompt(question, text.removeprefix(added), tuple(ids)))
    if count and len(prompts) < len(QUESTIONS):
        say(
            f"note: {len(prompts)} of {len(QUESTIONS)} golden prompts; the others and {count} tokens exceed the context"
        )
    return Golden(tuple(prompts), count, ends, tokenizer.decode, functools.partial(_announce, say)) if prompts else None


def _announce(say: Callable[[str], None], seconds: float) -> None:
    if seconds > 60:
        say(f"answering golden prompts takes up to {seconds / 60:.0f} min; --golden-tokens 0 skips this")


@dataclasses.dataclass(frozen=True)
class Record:
    """One prompt of the file; the continuation ends before the token that ends the answer.

    Attributes:
      text_gives_ids: Whether another encoder gets these ids from the whole text. Training encodes a conversation part
        by part, which is the same for LLaMA's vocabulary, but not for one with pieces that extend across words.
      message: The user's message in the prompt; "" in files that were written without it.
      message_gives_ids: Whether transformers gets these ids from the message with the directory's chat template; None
        if that was not tested.
    """

    text: str
    ids: tuple[int, ...]
    text_gives_ids: bool
    continuation: str
    continuation_ids: tuple[int, ...]
    margins: tuple[float, ...]
    ended: bool
    message: str = ""
    message_gives_ids: bool | None = None


def answer(weights: Weights, config: LlamaConfig, golden: Golden, encoder: OtherEncoder | None) -> list[Record]:
    """The greedy continuations. The weights are read once per token, for all prompts together.

    Args:
      weights: The weights of the written files.
      config: Their sizes.
      golden: The prompts.
      encoder: The encoder of the written directory; None if no other library can read its tokenizer.
    """
    chosen, margins = streamed_greedy(weights, config, [prompt.ids for prompt in golden.prompts], golden.count)
    records = []
    for prompt, ids, clear in zip(golden.prompts, chosen.tolist(), margins.tolist(), strict=True):
        length = next((i for i, token in enumerate(ids) if token in golden.ends), len(ids))
        kept = tuple(ids[:length])
        rounded = tuple(round(margin, 4) for margin in clear[: length + 1])
        same_text = encoder is not None and encoder.text(prompt.text) == list(prompt.ids)
        same_chat = None
        if encoder is not None and encoder.chat is not None:
            same_chat = encoder.chat(prompt.message) == list(prompt.ids)
        records.append(
            Record(
                prompt.text,
                prompt.ids,
                same_text,
                golden.decode(kept),
                kept,
                rounded,
                length < len(ids),
                prompt.message,
                same_chat,
            )
        )
    return records


def notes(records: Sequence[Record], encoder: OtherEncoder | None) -> list[str]:
    """Notes for serving the model."""
    if encoder is None:
        return [
            "only flacuna_jax encoded the prompts: transformers, with which ids are compared, is not installed or "
            "cannot read this tokenizer"
        ]
    found = []
    if not all(record.text_gives_ids for record in records):
        found.append(
            f"{encoder.name} encodes whole prompts to ids that differ from training, which encodes parts; serve ids"
        )
    if any(record.message_gives_ids is False for record in records):
        found.append(
            f"{encoder.name} with the chat template encodes a message to ids that differ from training; serve ids"
        )
    return found


def write_golden(directory: Path, records: Sequence[Record], count: int) -> None:
    what = "greedy continuations of the weights beside this file, in float32; text has no BOS if the tokenizer adds it"
    lines = ",\n".join(f"    {json.dumps(dataclasses.asdict(record), ensure_ascii=False)}" for record in records)
    content = f'{{\n  "what": "{what}",\n  "max_new_tokens": {count},\n  "prompts": [\n{lines}\n  ]\n}}\n'
    (directory / FILE).write_text(content, encoding="utf-8")


def read_golden(directory: Path) -> tuple[list[Record], int]:
    """The records, and the number of tokens of each continuation.

    Raises:
      UserError: the file is missing or damaged.
    """
    content = read_json(directory / FILE)
    try:
        return [_record(entry) for entry in content["prompts"]], int(content["max_new_tokens"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{directory / FILE} is damaged ({error}); export the model again") from None


def _record(entry: dict[str, Any]) -> Record:
    lists = {name: tuple(entry[name]) for name in ("ids", "continuation_ids", "margins")}
    return Record(**{**entry, **lists})


def compare(expected: Record, found: Sequence[int]) -> str | None:
    """Describes the difference between a continuation and the recorded one; None if they agree.

    A first difference with a margin below `CLOSE` is attributed to rounding, and the tokens after it are ignored.
    """
    wanted = expected.continuation_ids
    shorter = min(len(wanted), len(found))
    place = next((i for i in range(shorter) if wanted[i] != found[i]), shorter)
    same = len(found) == place == len(wanted)
    return None if same else _difference(expected, place, str(found[place]) if place < len(found) else "the end")


def compare_text(expected: Record, found: str, decode: Callable[[Sequence[int]], str]) -> str | None:
    """Like `compare`, for a server that returns text."""
    if found.strip() == expected.continuation.strip():
        return None
    ids = expected.continuation_ids
    agreeing = (k for k in range(len(ids), 0, -1) if found.strip().startswith(decode(ids[:k]).strip()))
    return _difference(expected, next(agreeing, 0), f"in {found!r}")


def _difference(expected: Record, place: int, found: str) -> str | None:
    margin = expected.margins[place] if place < len(expected.margins) else 0.0
    if margin < CLOSE:
        return None
    wanted = expected.continuation_ids[place] if place < len(expected.continuation_ids) else "the end"
    return (
        f"token {place + 1} of the answer is {found}, but the recorded one is {wanted} ({expected.continuation!r}), "
        f"with a margin of {margin:.2f} to the second most likely"
    )
