"""`golden_prompts.json`: what a merged model answers, so that whatever serves it can be checked against training.

A prompt is written as text without BOS (servers add one), as the ids that training would see, BOS included, and with
the greedy continuation of the written files in float32. Margins tell how clear each choice was: where the two likeliest
tokens are close, a server in half precision may take the other one.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.json_file import read_json
from flacuna_jax.huggingface.probe import Weights, streamed_greedy
from flacuna_jax.model.llama import LlamaConfig

FILE = "golden_prompts.json"
CLOSE = 0.1
"""Margins below this may be decided by rounding in half precision."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Text without BOS, and ids with it.

    Attributes:
      text_gives_ids: whether the whole text has these ids. Training encodes a conversation part by part, which is the
        same for LLaMA's vocabulary, but not for one with pieces that reach over the end of a word.
    """

    text: str
    ids: tuple[int, ...]
    text_gives_ids: bool


@dataclasses.dataclass(frozen=True)
class Golden:
    """What to ask, for how many tokens, and how to read the answer.

    Attributes:
      decode: ids → text.
      announce: told, before the answers are made, how many seconds that will take at most, about.
    """

    prompts: tuple[Prompt, ...]
    count: int
    eos_id: int
    decode: Callable[[Sequence[int]], str]
    announce: Callable[[float], None] = lambda seconds: None


@dataclasses.dataclass(frozen=True)
class Record:
    """One prompt of the file; the continuation ends before EOS."""

    text: str
    ids: tuple[int, ...]
    text_gives_ids: bool
    continuation: str
    continuation_ids: tuple[int, ...]
    margins: tuple[float, ...]
    ended: bool


def answer(weights: Weights, config: LlamaConfig, golden: Golden) -> list[Record]:
    """The greedy continuations; each token costs one reading of the weights, together for all prompts."""
    chosen, margins = streamed_greedy(weights, config, [prompt.ids for prompt in golden.prompts], golden.count)
    records = []
    for prompt, ids, clear in zip(golden.prompts, chosen.tolist(), margins.tolist(), strict=True):
        length = ids.index(golden.eos_id) if golden.eos_id in ids else len(ids)
        kept = tuple(ids[:length])
        rounded = tuple(round(margin, 4) for margin in clear[: length + 1])
        records.append(
            Record(
                prompt.text, prompt.ids, prompt.text_gives_ids, golden.decode(kept), kept, rounded, length < len(ids)
            )
        )
    return records


def write_golden(directory: Path, records: Sequence[Record], count: int) -> None:
    what = "greedy continuations of the weights beside this file, in float32; text has no BOS, ids have one"
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
