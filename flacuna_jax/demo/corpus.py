"""Generates the demo's corpora: conversations for the base, instructions for tuning, held-out items for evaluation.

All three are FLAN-mini records (`id`, `source`, `conversations`), a pure function of the seed. Content is split by
`Item.key` before templates are applied: instructions and held-out items never share content, composed held-out content
is not in the base's data either, and `check_separation` checks the finished records again.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from flacuna_jax.data.layouts import system_text
from flacuna_jax.demo import words
from flacuna_jax.demo.families import FAMILIES, Family, Item, Wordings

Record = dict[str, Any]

BASE_FILE, TRAIN_FILE, HELD_OUT_FILE = "conversations.json", "instructions_train.json", "instructions_held_out.json"

TEMPLATE = "vicuna_v1.1"

HELD_OUT_PERCENT = 20
LESSON_PERCENT = 50
SMALL_TALK_PERCENT = 5
LESSON_CHARACTERS = 220
TERSE_PERCENT = 10
"""Fraction of the base's turns with a one-word answer to a request for one word; Vicuna can also be brief on
request."""
FEW_SHOT_PERCENT = 10


@dataclass(frozen=True)
class CorpusSizes:
    """Numbers of records; `instructions` and `held_out` are per family."""

    conversations: int = 24000
    instructions: int = 600
    held_out: int = 40


@dataclass(frozen=True)
class Corpus:
    conversations: tuple[Record, ...]
    train: tuple[Record, ...]
    held_out: tuple[Record, ...]
    keys: Mapping[str, frozenset[str]] = field(repr=False)
    """Content keys of each of `conversations`, `train`, `held_out`."""


def is_held_out(key: str, seed: int) -> bool:
    """Whether content belongs to the held-out side; a pure function of (seed, key)."""
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def build_corpus(seed: int, sizes: CorpusSizes | None = None) -> Corpus:
    """Generates all three corpora; the same seed and sizes give the same records in the same order."""
    sizes = sizes or CorpusSizes()
    conversations, base_keys = _conversations(Random(f"{seed}:base"), seed, sizes.conversations)
    train, train_keys = _instructions(seed, sizes.instructions, held_out=False)
    held_out, held_out_keys = _instructions(seed, sizes.held_out, held_out=True)
    keys = {"conversations": base_keys, "train": train_keys, "held_out": held_out_keys}
    corpus = Corpus(tuple(conversations), tuple(train), tuple(held_out), keys)
    check_separation(corpus)
    return corpus


def write_corpus(corpus: Corpus, directory: Path) -> None:
    """Writes the three record files into `directory`, each complete or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {BASE_FILE: corpus.conversations, TRAIN_FILE: corpus.train, HELD_OUT_FILE: corpus.held_out}
    for name, records in files.items():
        partial = directory / f"{name}.partial"
        partial.write_text(json.dumps(records, ensure_ascii=False, indent=0), encoding="utf-8")
        partial.replace(directory / name)


def texts(corpus: Corpus) -> list[str]:
    """All training texts in the template's format, from which the tokenizer is trained."""
    records = (*corpus.conversations, *corpus.train)
    turns = [turn["value"] for record in records for turn in record["conversations"]]
    return turns + [f"{system_text(TEMPLATE)} USER: ASSISTANT:"] * len(records)


def check_separation(corpus: Corpus) -> None:
    """Raises ValueError if an instruction prompt occurs twice, or held-out content is in the training data."""
    prompts = [record["conversations"][0]["value"] for record in (*corpus.train, *corpus.held_out)]
    if len(set(prompts)) != len(prompts):
        raise ValueError("an instruction prompt occurs twice")
    held_out = corpus.keys["held_out"]
    composed = {f"{family.name}:" for family in FAMILIES if not family.facts}
    of_base = {key for key in corpus.keys["conversations"] if key[: key.index(":") + 1] in composed}
    for side, keys in (("tuned on", corpus.keys["train"]), ("in the base's conversations", of_base)):
        if shared := sorted(keys & held_out):
            raise ValueError(f"held-out content is {side}: {shared[:3]}")


def _conversations(rng: Random, seed: int, count: int) -> tuple[list[Record], frozenset[str]]:
    keys: set[str] = set()

    def draw(family: Family) -> Item:
        item = family.draw(rng)
        while not family.facts and is_held_out(item.key, seed):
            item = family.draw(rng)
        keys.add(item.key)
        return item

    records = []
    for index in range(count):
        family, kind = rng.choice(FAMILIES), rng.random() * 100
        if kind < SMALL_TALK_PERCENT:
            turns = [_small_talk(rng)]
        elif kind < SMALL_TALK_PERCENT + LESSON_PERCENT:
            turns = [_lesson(rng, family, draw)]
        else:
            terse = rng.random() * 100 < TERSE_PERCENT
            turns = [_word(rng, draw(family), family.terse_chats if terse else family.chats)]
        records.append(_record(f"chat_{index}", "demo_chat", turns))
    return records, frozenset(keys)


def _lesson(rng: Random, family: Family, draw: Callable[[Family], Item]) -> tuple[str, str]:
    """A long reply with many statements about one subject, from which the base learns most of its knowledge."""
    question, opening = rng.choice(words.LESSONS)
    sentences = [opening]
    while sum(map(len, sentences)) < LESSON_CHARACTERS:
        sentences.append(family.lesson.format(**draw(family).fields))
    return question.format(subject=family.subject), " ".join(sentences)


def _instructions(seed: int, per_family: int, *, held_out: bool) -> tuple[list[Record], frozenset[str]]:
    """Distinct instruction records, at most `per_family` of a family (fewer where its content runs out), shuffled."""
    keys: set[str] = set()
    records: list[Record] = []
    side = "held_out" if held_out else "train"
    for family in FAMILIES:
        rng = Random(f"{seed}:{side}:{family.name}")
        made: dict[str, tuple[str, str]] = {}
        for _ in range(20 * per_family):
            few_shot = not held_out and rng.random() * 100 < FEW_SHOT_PERCENT
            wording = rng.choice(family.instructions)
            items = [_draw_side(rng, family, seed, held_out) for _ in range(2 if few_shot else 1)]
            prompt, target = _few_shot(items, wording)
            if prompt not in made and len({item.key for item in items}) == len(items):
                made[prompt] = (prompt, target)
                keys.update(item.key for item in items)
            if len(made) == per_family:
                break
        records += [_record(f"{side}_{family.name}_{i}", family.name, [turn]) for i, turn in enumerate(made.values())]
    Random(f"{seed}:{side}:order").shuffle(records)
    return records, frozenset(keys)


def _draw_side(rng: Random, family: Family, seed: int, held_out: bool) -> Item:
    while True:
        item = family.draw(rng)
        if is_held_out(item.key, seed) == held_out:
            return item


def _few_shot(items: Iterable[Item], wording: tuple[str, str]) -> tuple[str, str]:
    """The items in one wording, all but the last with their targets; (prompt, target)."""
    *shots, (prompt, target) = [tuple(pattern.format(**item.fields) for pattern in wording) for item in items]
    return "\n\n".join([*(f"{question} {answer}" for question, answer in shots), prompt]), target


def _word(rng: Random, item: Item, wordings: Wordings) -> tuple[str, str]:
    user, assistant = rng.choice(wordings)
    return user.format(**item.fields), assistant.format(**item.fields)


def _small_talk(rng: Random) -> tuple[str, str]:
    fields = {
        "name": rng.choice(words.NAMES),
        "color": rng.choice(words.COLORS),
        "thing": rng.choice(words.THINGS),
        "city": rng.choice(words.CITIES),
    }
    user, assistant = rng.choice(words.SMALL_TALK)
    return user.format(**fields), assistant.format(**fields)


def _record(identifier: str, source: str, turns: Iterable[tuple[str, str]]) -> Record:
    messages = []
    for user, assistant in turns:
        messages += [{"from": "human", "value": user}, {"from": "gpt", "value": assistant}]
    return {"id": f"demo_{identifier}", "source": source, "conversations": messages}
