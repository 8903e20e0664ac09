"""Leakage: finds items of evaluation files in the training records, by n-grams of words, and benchmarks that are
held-in because their tasks are among the training tasks.

A word is a run of letters or digits, lower-cased. An item's coverage is the fraction of its distinct n-grams that
occur in training records, separately for prompts and answers. Items of fewer than n words cannot be judged and are
counted as such.
"""

import csv
import gzip
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO, cast

import numpy as np
from numpy.typing import NDArray

from flacuna_jax.data.files import kind_of, read_records
from flacuna_jax.data.report import BadRecordPolicy, SourceReport
from flacuna_jax.errors import UserError
from flacuna_jax.flan_mini.readers.task_rows import all_columns

HELD_IN: Mapping[str, str] = MappingProxyType(
    {
        "DROP": r"^drop(?:[:/_]|$)|^task\d+_drop_",
        "MMLU": r"mmmlu|mmlu|hendrycks",
        "BBH": r"big_?bench|(?:^|_)bbh(?:_|$)",
        "CRASS": r"(?:^|_)crass(?:_|$)",
        "HumanEval": r"human_?eval",
        "HHH": r"(?:^|_)hhh(?:_|$)",
        "GSM8K": r"gsm8k",
        "ARC": r"^ai2_arc|^arc_|_arc_",
        "HellaSwag": r"hellaswag",
        "PIQA": r"^piqa|_piqa_",
        "WinoGrande": r"winogrande",
        "BoolQ": r"bool_?q",
        "OpenBookQA": r"openbookqa",
        "LAMBADA": r"lambada",
        "TriviaQA": r"trivia_?qa",
        "APPS": r"^apps$",
    }
)
"""Benchmark -> pattern of the training tasks made from it."""

_WORD = re.compile(r"[^\W_]+")
_ITEM_LISTS = ("examples", "instances", "questions", "items", "data")
_NOT_TEXT = {"canary", "canary_string", "id", "url", "task_id", "query_id", "difficulty"}
_BASE = 0x9E3779B97F4A7C15
_WORDS_PER_BLOCK = 1 << 18


def held_in(tasks: Iterable[str]) -> dict[str, list[str]]:
    """The training tasks that belong to each benchmark, for those benchmarks that have any."""
    tasks = sorted(set(tasks))
    found = {name: [task for task in tasks if re.search(pattern, task)] for name, pattern in HELD_IN.items()}
    return {name: members for name, members in found.items() if members}


@dataclass(frozen=True)
class BenchmarkLeakage:
    """Counts of one benchmark's items.

    prompt, answer, anywhere: coverage of each judged item by prompts, by answers, and by both, float64 [judged].
    """

    name: str
    items: int
    too_short: int
    prompt: NDArray[np.float64]
    answer: NDArray[np.float64]
    anywhere: NDArray[np.float64]
    tasks: tuple[tuple[str, int], ...]
    """Training tasks with the most records that share an n-gram with the benchmark, and their numbers."""
    worst: tuple[tuple[float, str], ...]
    """The most covered items, with the beginning of their text."""

    def touched(self) -> int:
        return int((self.anywhere > 0).sum())

    def covered(self, part: float) -> int:
        """Number of items whose coverage by training records is at least `part`."""
        return int((self.anywhere >= part).sum())


class LeakageScan:
    """Stores the n-grams of all items, and records which of them occur in training records that are added one by
    one."""

    def __init__(self, files: Mapping[str, str], ngram: int) -> None:
        self._ngram = ngram
        self._hasher = _Hasher(ngram)
        self._names = tuple(files)
        self._texts: list[str] = []
        self._benchmark: list[int] = []
        self._lengths: list[int] = []
        grams: list[NDArray[np.uint64]] = []
        for index, path in enumerate(files.values()):
            for text in read_items(Path(path)):
                found = np.unique(self._hasher.ngrams(text))
                self._texts.append(" ".join(text.split())[:200])
                self._benchmark.append(index)
                self._lengths.append(len(found))
                grams.append(found)
        flat = np.concatenate(grams) if grams else np.zeros(0, np.uint64)
        self._vocabulary, self._gram_of = np.unique(flat, return_inverse=True)
        self._seen = np.zeros((2, len(self._vocabulary)), np.bool_)
        # The benchmarks of each n-gram, as bits.
        self._owners = np.zeros(len(self._vocabulary), np.uint64)
        owner_bits = np.repeat(np.uint64(1) << np.array(self._benchmark, np.uint64), self._lengths)
        np.bitwise_or.at(self._owners, self._gram_of, owner_bits)
        self._task_hits: list[Counter[str]] = [Counter() for _ in self._names]
        self._block = _Block()

    def add(self, task: str, prompts: Sequence[str], answers: Sequence[str]) -> None:
        """Adds a training record."""
        for part, texts in enumerate((prompts, answers)):
            for text in texts:
                self._block.add(self._hasher.words(text), part, task)
        if self._block.size >= _WORDS_PER_BLOCK:
            self._flush()

    def finish(self) -> list[BenchmarkLeakage]:
        self._flush()
        starts = np.concatenate(([0], np.cumsum(self._lengths))).astype(np.int64)
        benchmark = np.array(self._benchmark)
        lengths = np.array(self._lengths)
        results = []
        for index, name in enumerate(self._names):
            items = np.flatnonzero(benchmark == index)
            judged = items[lengths[items] > 0]
            prompt, answer, anywhere = (
                np.array([seen[self._gram_of[starts[i] : starts[i + 1]]].mean() for i in judged], np.float64)
                for seen in (*self._seen, self._seen.any(axis=0))
            )
            order = np.argsort(-anywhere, kind="stable")[:5]
            worst = tuple((float(anywhere[i]), self._texts[judged[i]]) for i in order if anywhere[i] > 0)
            tasks = tuple(sorted(self._task_hits[index].items(), key=lambda pair: (-pair[1], pair[0]))[:8])
            short = len(items) - len(judged)
            results.append(BenchmarkLeakage(name, len(items), short, prompt, answer, anywhere, tasks, worst))
        return results

    def _flush(self) -> None:
        if not self._block.size or not len(self._vocabulary):
            self._block = _Block()
            return
        words, text_of, parts, tasks = self._block.arrays()
        hashes, starts = self._hasher.windows(words, text_of)
        places = np.minimum(np.searchsorted(self._vocabulary, hashes), len(self._vocabulary) - 1)
        hit = self._vocabulary[places] == hashes
        grams, texts = places[hit], text_of[starts[hit]]
        for part in (0, 1):
            self._seen[part, grams[parts[texts] == part]] = True
        owners = np.zeros(len(parts), np.uint64)
        np.bitwise_or.at(owners, texts, self._owners[grams])
        for text in np.flatnonzero(owners):
            for index, hits in enumerate(self._task_hits):
                if int(owners[text]) >> index & 1:
                    hits[tasks[text]] += 1
        self._block = _Block()


class _Block:
    """A batch of texts to look up together, as hashed words."""

    def __init__(self) -> None:
        self._words: list[list[int]] = []
        self._parts: list[int] = []
        self._tasks: list[str] = []
        self.size = 0

    def add(self, words: list[int], part: int, task: str) -> None:
        self._words.append(words)
        self._parts.append(part)
        self._tasks.append(task)
        self.size += len(words)

    def arrays(self) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64], list[str]]:
        """The words of all texts, the text index of each word, and each text's part and task."""
        flat = np.fromiter((word for words in self._words for word in words), np.uint64, self.size)
        text_of = np.repeat(np.arange(len(self._words)), [len(words) for words in self._words])
        return flat, text_of, np.array(self._parts), self._tasks


class _Hasher:
    """64-bit hashes of words and of n-grams of words."""

    def __init__(self, ngram: int) -> None:
        self._ngram = ngram
        self._known: dict[str, int] = {}

    def words(self, text: str) -> list[int]:
        known = self._known
        hashes = []
        for word in _WORD.findall(text.lower()):
            value = known.get(word)
            if value is None:
                value = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
                if len(known) < 1 << 20:
                    known[word] = value
            hashes.append(value)
        return hashes

    def ngrams(self, text: str) -> NDArray[np.uint64]:
        words = np.array(self.words(text), np.uint64)
        return self.windows(words, np.zeros(len(words), np.int64))[0]

    def windows(
        self, words: NDArray[np.uint64], text_of: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Hashes of all n-grams within a text, and the index of the first word of each."""
        count = len(words) - self._ngram + 1
        if count <= 0:
            return np.zeros(0, np.uint64), np.zeros(0, np.int64)
        hashes = np.zeros(count, np.uint64)
        for offset in range(self._ngram):
            hashes = hashes * np.uint64(_BASE) + words[offset : offset + count]
        starts = np.flatnonzero(text_of[:count] == text_of[self._ngram - 1 :])
        return hashes[starts], starts


def read_items(path: Path) -> Iterator[str]:
    """The texts of an evaluation file's items, or of all files of a directory.

    JSON: the elements of the list, or of the object's list (examples, data, ...), or the object's values; csv and tsv:
    the rows; txt: the paragraphs. Raises UserError for a path without a readable file.
    """
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _is_readable(file))
        if not files:
            raise UserError(f"{path}: there is no evaluation file (leakage.files)")
        for file in files:
            yield from read_items(file)
    elif not path.is_file():
        raise UserError(f"{path}: no such file or directory (leakage.files)")
    elif not _is_readable(path):
        raise UserError(f"{path}: evaluation items cannot be read from this kind of file (leakage.files)")
    elif _is_plain(path):
        yield from _plain_items(path)
    else:
        policy = BadRecordPolicy(SourceReport(str(path)), "error", "leakage.files")
        for raw in read_records(path, all_columns(path), policy):
            yield from (" ".join(_texts(item)) for item in _items(raw.value))


def _is_readable(path: Path) -> bool:
    return _is_plain(path) or kind_of(path) is not None


def _is_plain(path: Path) -> bool:
    """Whether a file has paragraphs, or a table whose first line may be an item."""
    return path.name.lower().endswith(tuple(s + gz for s in (".csv", ".tsv", ".txt") for gz in ("", ".gz")))


def _plain_items(path: Path) -> Iterator[str]:
    try:
        with cast(TextIO, (gzip.open if path.name.endswith(".gz") else open)(path, "rt", encoding="utf-8")) as file:
            if ".txt" in path.name:
                yield from (part for part in re.split(r"\n\s*\n", file.read()) if part.strip())
            else:
                yield from (" ".join(row) for row in csv.reader(file) if row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def _items(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        return [value]
    for name in _ITEM_LISTS:
        if isinstance(value.get(name), list) and value[name] and isinstance(value[name][0], dict | list):
            return list(value[name])
    if value and all(isinstance(part, dict) for part in value.values()):
        return list(value.values())
    return [value]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            if name not in _NOT_TEXT:
                # Multiple-choice layouts have the options as keys ({"target_scores": {"yes": 1}}).
                if isinstance(part, int | float):
                    yield str(name)
                yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
