"""The stages of a build as jobs: scan the files, fetch the drawn items, word and measure them.

scan    reads every file once and stores the key and stratum of each item, about 20 bytes.
fetch   reads the files again and writes the drawn items into buckets, a task's items together.
write   words the items of a bucket, with exemplars of their task, counts their tokens, and keeps the records.
"""

from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flacuna_jax.data.conversation import named_template
from flacuna_jax.data.report import BadRecordPolicy, SourceReport
from flacuna_jax.data.tokenization import SegmentEncoder, Tokenizer
from flacuna_jax.flan_mini.config import FlanMiniConfig, MixtureSource
from flacuna_jax.flan_mini.few_shot import Writer
from flacuna_jax.flan_mini.items import Item, hash64, item_from_json, ranks
from flacuna_jax.flan_mini.readers import READERS
from flacuna_jax.flan_mini.records import Outcome, RecordMaker
from flacuna_jax.flan_mini.templates import load_families, load_shapes
from flacuna_jax.flan_mini.work import WRITTEN, Arrays, Result, load_result, writing

LoadTokenizer = Callable[[], Tokenizer]

CANDIDATE, EXEMPLAR = 1, 2
"""Bits for the purpose of a fetched item."""


def _items(
    config: FlanMiniConfig, source: MixtureSource, files: Sequence[Path], report: SourceReport
) -> Iterator[Item]:
    policy = BadRecordPolicy(report, config.on_bad_record, "on_bad_record")
    for path in files:
        for _, item in READERS[source.kind].read(source, path, policy):
            yield item


def scan(config: FlanMiniConfig, source: MixtureSource, files: Sequence[Path]) -> Result:
    """Arrays per item: keys uint64 [n]; stratum int32 [n], index into facts["strata"]; same uint64 [n, 2], hashes of
    `Item.same_as` (0: none); sizes int32 [n]. Facts: the strata, [task, type] each, and the counts of the report."""
    report = SourceReport(source.path)
    strata: dict[tuple[str, str], int] = {}
    keys, stratum, same, sizes = array("Q"), array("i"), array("Q"), array("i")
    for item in _items(config, source, files, report):
        keys.append(item.key())
        stratum.append(strata.setdefault((item.task, item.type), len(strata)))
        marks = [hash64(mark) for mark in item.same_as]
        same.extend((marks + [0, 0])[:2])
        sizes.append(item.size)
    arrays: dict[str, NDArray[Any]] = {
        "keys": np.array(keys, np.uint64),
        "stratum": np.array(stratum, np.int32),
        "same": np.array(same, np.uint64).reshape(-1, 2),
        "sizes": np.array(sizes, np.int32),
    }
    return Result(arrays, {"strata": [list(s) for s in strata], **counts_of(report)})


def counts_of(report: SourceReport) -> dict[str, object]:
    return {
        "read": report.read,
        "dropped": dict(report.dropped),
        "changed": dict(report.changed),
        "first_seen": report.first_seen,
    }


@dataclass(frozen=True)
class Drawn:
    """The items to fetch in a round: sorted keys uint64 [n], purpose uint8 [n], and the buckets of each item.

    A task with `spread` s uses the buckets (base + 0..s-1) mod buckets: a candidate is in one of them, by its key, an
    exemplar in all of them.
    """

    keys: NDArray[np.uint64]
    purpose: NDArray[np.uint8]
    base: NDArray[np.int32]
    spread: NDArray[np.int32]
    buckets: int

    def result(self) -> Result:
        arrays: Arrays = {"keys": self.keys, "purpose": self.purpose, "base": self.base, "spread": self.spread}
        return Result(arrays, {"buckets": self.buckets})

    @staticmethod
    def of(result: Result) -> "Drawn":
        return Drawn(**result.arrays, buckets=result.facts["buckets"])


def fetch(
    config: FlanMiniConfig, source: MixtureSource, files: Sequence[Path], drawn_path: Path, directory: Path, unit: int
) -> Result:
    """Writes the drawn items of some files to `directory`/{unit}-{bucket}.items, a line each: key, purpose, item."""
    drawn = Drawn.of(load_result(drawn_path))
    place_of = dict(zip(drawn.keys.tolist(), range(len(drawn.keys)), strict=True))
    written = 0
    with ExitStack() as stack:
        outputs = [stack.enter_context(writing(items_path(directory, unit, b))) for b in range(drawn.buckets)]
        for item in _items(config, source, files, SourceReport(source.path)):
            key = item.key()
            place = place_of.get(key)
            if place is None:
                continue
            purpose, base, spread = int(drawn.purpose[place]), int(drawn.base[place]), int(drawn.spread[place])
            home = key % spread
            for step in range(spread):
                here = purpose if step == home else purpose & EXEMPLAR
                if here:
                    outputs[(base + step) % drawn.buckets].write(f"{key:016x} {here} {item.to_json()}\n")
            written += 1
    return Result({}, {"items": written})


def items_path(directory: Path, unit: int, bucket: int) -> Path:
    return directory / f"{unit}-{bucket}.items"


def records_path(directory: Path, bucket: int) -> Path:
    return directory / f"bucket-{bucket}.records"


def write(
    config: FlanMiniConfig,
    source: MixtureSource,
    load_tokenizer: LoadTokenizer,
    directory: Path,
    units: int,
    bucket: int,
) -> Result:
    """Words a bucket's candidates, writes their records to `records_path`, and removes the files of `fetch`.

    The file has a line per record, "{order}{key}{part} {length} {supervised} {json}" with the first three in hex, in
    order. Arrays per candidate: keys uint64 [n], parts int32 [n] (its records), reason int32 [n] (index into
    facts["reasons"]; -1 if nothing was lost); per record: record_keys uint64 [m], part, length, supervised,
    traits int32 [m], text uint64 [m].
    """
    tokenizer = load_tokenizer()
    template = named_template(config.template, tokenizer.special)
    writer = Writer(
        load_families(config.family_templates),
        load_shapes(),
        config.seed,
        source.few_shot,
        config.few_shot.max_exemplars,
    )
    maker = RecordMaker(source.name, writer, template, tokenizer, SegmentEncoder(tokenizer), config.max_length)
    candidates, pools = _read_bucket([items_path(directory, unit, bucket) for unit in range(units)])
    outcomes: list[Outcome] = []
    for stratum in sorted(candidates):
        pool = sorted(pools[stratum].items(), key=lambda entry: _rank(entry[0], config.seed))
        outcomes += maker.make(sorted(candidates[stratum].items()), pool)
    result = _outcome_result(outcomes, config.seed)
    _write_records(records_path(directory, bucket), outcomes, config.seed)
    for unit in range(units):
        items_path(directory, unit, bucket).unlink(missing_ok=True)
    return result


def _rank(key: int, seed: int) -> int:
    return int(ranks(np.array([key], np.uint64), seed)[0])


Strata = dict[tuple[str, str], dict[int, Item]]


def _read_bucket(paths: Sequence[Path]) -> tuple[Strata, Strata]:
    """Candidates and exemplars by (task, type) and key. An item in several files counts once."""
    candidates: Strata = defaultdict(dict)
    pools: Strata = defaultdict(dict)
    for path in paths:
        if not path.exists():
            continue
        with path.open(encoding="utf-8") as file:
            for line in file:
                key, purpose, text = line.split(" ", 2)
                item = item_from_json(text)
                if int(purpose) & CANDIDATE:
                    candidates[item.task, item.type][int(key, 16)] = item
                if int(purpose) & EXEMPLAR:
                    pools[item.task, item.type][int(key, 16)] = item
    return candidates, pools


def _record_order(key: int, part: int, seed: int) -> int:
    return hash64("record", str(seed), str(key), str(part))


def _write_records(path: Path, outcomes: Sequence[Outcome], seed: int) -> None:
    lines = [
        f"{_record_order(outcome.key, part, seed):016x}{outcome.key:016x}{part:04x} {record.text}\n"
        for outcome in outcomes
        for part, record in enumerate(outcome.records)
    ]
    lines.sort()
    with writing(path) as file:
        file.writelines(lines)


def _outcome_result(outcomes: Sequence[Outcome], seed: int) -> Result:
    reasons: Counter[str] = Counter()
    changed: Counter[str] = Counter()
    reason_index: dict[str, int] = {}
    per_candidate: list[tuple[int, int, int]] = []
    rows: list[tuple[int, int, int, int, int, int]] = []
    for outcome in outcomes:
        index = -1
        for reason, count in outcome.lost.items():
            reasons[reason] += count
            index = reason_index.setdefault(reason, len(reason_index))
        changed.update(outcome.changed)
        per_candidate.append((outcome.key, len(outcome.records), index))
        for part, record in enumerate(outcome.records):
            digest = hash64("text", record.content)
            rows.append((outcome.key, part, record.length, record.supervised, record.traits, digest))
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(WRITTEN)
    arrays: dict[str, NDArray[Any]] = {
        name: np.array(column, kind) for (name, kind), column in zip(WRITTEN.items(), columns, strict=True)
    }
    candidate_columns = list(zip(*per_candidate, strict=True)) if per_candidate else [()] * 3
    for name, column, dtype in zip(
        ("keys", "parts", "reason"), candidate_columns, (np.uint64, np.int32, np.int32), strict=True
    ):
        arrays[name] = np.array(column, dtype)
    return Result(arrays, {"reasons": list(reason_index), "lost": dict(reasons), "changed": dict(changed)})
