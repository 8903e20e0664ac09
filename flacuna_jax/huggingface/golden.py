"""`golden_prompts.json`: what a merged model answers, so that whatever serves it can be checked against training.

A prompt is written as the user's message, as text (without BOS if the tokenizer puts it in front), as the ids that
training would see, and with the greedy continuation of the written files in float32. transformers or tokenizers, and
not our own encoder, find out whether a server makes the same ids of the message and of the text. Margins tell how clear
each choice was: where the two likeliest tokens are close, a server in half precision may take the other one.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.files.json_file import read_json
from flacuna_jax.huggingface.other_encoder import OtherEncoder
from flacuna_jax.huggingface.probe import Weights, streamed_greedy
from flacuna_jax.model.llama import LlamaConfig

FILE = "golden_prompts.json"
CLOSE = 0.1
"""Margins below this may be decided by rounding in half precision."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The user's message, the whole prompt as text, and the ids of training."""

    message: str
    text: str
    ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Golden:
    """What to ask, for how many tokens, and how to read the answer.

    Attributes:
      ends: tokens that end an answer.
      decode: ids → text.
      announce: told, before the answers are made, how many seconds that will take at most, about.
    """

    prompts: tuple[Prompt, ...]
    count: int
    ends: tuple[int, ...]
    decode: Callable[[Sequence[int]], str]
    announce: Callable[[float], None] = lambda seconds: None


@dataclasses.dataclass(frozen=True)
class Record:
    """One prompt of the file; the continuation ends before the token that ends the answer.

    Attributes:
      text_gives_ids: Whether another encoder makes these ids of the whole text. Training encodes a conversation part by
        part, which is the same for LLaMA's vocabulary, but not for one with pieces that reach over the end of a word.
      message: What the user says in the prompt; "" in files that were written without it.
      message_gives_ids: Whether transformers makes these ids of the message with the directory's chat template; None
        if that was not tried.
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
    """The greedy continuations; each token costs one reading of the weights, together for all prompts.

    Args:
      weights: Of the written files.
      config: Their sizes.
      golden: What to ask.
      encoder: Of the written directory; None if no other library can read its tokenizer.
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
    """What a person who serves the model should know."""
    if encoder is None:
        return ["neither transformers nor tokenizers can read this tokenizer here; prompts were not encoded with them"]
    found = []
    if not all(record.text_gives_ids for record in records):
        found.append(
            f"{encoder.name} encodes whole prompts to other ids than training, which encodes their parts; serve ids"
        )
    if any(record.message_gives_ids is False for record in records):
        found.append(
            f"{encoder.name} makes other ids of a message with the chat template than training does; serve ids"
        )
    return found


def write_golden(directory: Path, records: Sequence[Record], count: int) -> None:
    what = "greedy continuations of the weights beside this file, in float32; text has no BOS if the tokenizer adds it"
    lines = ",\n".join(f"    {json.dumps(dataclasses.asdict(record), ensure_ascii=False)}" for record in records)
    content = f'{{\n  "what": "{what}",\n  "max_new_tokens": {count},\n  "prompts": [\n{lines}\n  ]\n}}\n'
    (directory / FILE).write_text(content, encoding="utf-8")


def read_golden(directory: Path) -> tuple[list[Record], int]:
    """The records, and for how many tokens each was continued.

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
    """What differs between a continuation and the recorded one, None where nothing does.

    A first difference where the margin is below `CLOSE` is rounding's, and what follows it says nothing.
    """
    wanted = expected.continuation_ids
    shorter = min(len(wanted), len(found))
    place = next((i for i in range(shorter) if wanted[i] != found[i]), shorter)
    same = len(found) == place == len(wanted)
    return None if same else _difference(expected, place, str(found[place]) if place < len(found) else "the end")


def compare_text(expected: Record, found: str, decode: Callable[[Sequence[int]], str]) -> str | None:
    """As `compare`, for a server that answers with text."""
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
        f"token {place + 1} of the answer is {found}, recorded is {wanted} ({expected.continuation!r}), "
        f"{margin:.2f} ahead of the second likeliest"
    )
