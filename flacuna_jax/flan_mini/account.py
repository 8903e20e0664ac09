"""The account of a build: what happened to every record and item of a source, and statistics of the resulting
records."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flacuna_jax.flan_mini.config import FlanMiniConfig, MixtureSource
from flacuna_jax.flan_mini.draw import UNTRIED, Candidates
from flacuna_jax.flan_mini.work import WRITTEN, Arrays, Result


@dataclass(frozen=True)
class SourceAccount:
    """Counts of one source, from raw records to the mixture. Every item is in exactly one place (`check`).

    read: raw records. unusable: raw records without an item, by reason. items: items of the usable records (one per
    solution for a problem). set_aside: items that were not tried, by reason (duplicates, excluded tasks). distinct: the
    others, of which used: items in the mixture; failed: items without a record; spare: items with records that were not
    needed; untried: items that were not drawn. lost: items or question-answer pairs that did not fit, by reason.
    records: records in the mixture.
    """

    name: str
    kind: str
    wanted: int
    read: int
    unusable: Mapping[str, int]
    changed: Mapping[str, int]
    first_seen: Mapping[str, str]
    items: int
    set_aside: Mapping[str, int]
    distinct: int
    used: int
    failed: int
    spare: int
    untried: int
    lost: Mapping[str, int]
    records: int
    per_task: Mapping[str, int]
    available_per_task: Mapping[str, int]
    per_type: Mapping[str, int]
    ignored_files: tuple[str, ...]

    @staticmethod
    def of(
        config: FlanMiniConfig,
        source: MixtureSource,
        ignored: tuple[str, ...],
        scans: Sequence[Result],
        candidates: Candidates,
        keys: NDArray[np.uint64],
        used: NDArray[np.int32],
        written: Sequence[Result],
    ) -> "SourceAccount":
        first_seen: dict[str, str] = {}
        for scan in scans:
            first_seen = scan.facts["first_seen"] | first_seen
        parts = candidates.parts
        giving = int((parts > 0).sum())
        per_task, per_type, available = _per_stratum(candidates, keys, used)
        account = SourceAccount(
            name=source.name,
            kind=source.kind,
            wanted=config.wanted(source),
            read=sum(scan.facts["read"] for scan in scans),
            unusable=_sum(scan.facts["dropped"] for scan in scans),
            changed=_sum([*(scan.facts["changed"] for scan in scans), *(w.facts["changed"] for w in written)]),
            first_seen=first_seen,
            items=sum(len(scan.arrays["keys"]) for scan in scans),
            set_aside=dict(candidates.set_aside),
            distinct=len(candidates.keys),
            used=len(keys),
            failed=int((parts == 0).sum()),
            spare=giving - len(keys),
            untried=int((parts == UNTRIED).sum()),
            lost=_sum(result.facts["lost"] for result in written),
            records=int(used.sum()),
            per_task=per_task,
            available_per_task=available,
            per_type=per_type,
            ignored_files=ignored,
        )
        account.check()
        return account

    def check(self) -> None:
        """Raises AssertionError if items are missing, which would be an error in this program."""
        if self.items != sum(self.set_aside.values()) + self.distinct:
            raise AssertionError(f"{self.name}: items are unaccounted for: {self}")
        if self.distinct != self.used + self.failed + self.spare + self.untried:
            raise AssertionError(f"{self.name}: distinct items are unaccounted for: {self}")

    @property
    def duplicates(self) -> int:
        return sum(count for reason, count in self.set_aside.items() if reason.startswith("same "))

    def why_short(self) -> str:
        reasons = Counter(self.unusable) + Counter(self.set_aside) + Counter(self.lost)
        listed = "; ".join(f"{count:,} × {reason}" for reason, count in reasons.most_common(5))
        return f"{self.read:,} records read, {self.distinct:,} distinct items" + (f"; {listed}" if listed else "")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _sum(counts: Any) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in counts:
        total.update(part)
    return dict(sorted(total.items()))


def _per_stratum(
    candidates: Candidates, keys: NDArray[np.uint64], used: NDArray[np.int32]
) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Numbers of records per task and per type, and of distinct items per task."""
    per_task: Counter[str] = Counter()
    per_type: Counter[str] = Counter()
    available: Counter[str] = Counter()
    records = np.bincount(strata_of(candidates, keys), weights=used, minlength=len(candidates.strata))
    for index, (task, type_) in enumerate(candidates.strata):
        available[task] += candidates.count(index)
        per_task[task] += int(records[index])
        per_type[type_ or "-"] += int(records[index])
    return dict(sorted((+per_task).items())), dict(sorted((+per_type).items())), dict(sorted(available.items()))


def strata_of(candidates: Candidates, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The stratum of each key, int64 [n]."""
    return np.searchsorted(candidates.starts, candidates.places(keys), side="right") - 1


@dataclass(frozen=True)
class Statistics:
    """Statistics of the records of the mixture, arrays of the same length.

    source, task: int32, indices into `sources` and `tasks`. length, supervised: int32, tokens. traits: int32, bits of
    `records.Record`. text: uint64, hashes of the records' text.
    """

    sources: tuple[str, ...]
    tasks: tuple[str, ...]
    source: NDArray[np.int32]
    task: NDArray[np.int32]
    length: NDArray[np.int32]
    supervised: NDArray[np.int32]
    traits: NDArray[np.int32]
    text: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.length)

    @property
    def repeated(self) -> int:
        """Number of records with the same text as another record (of another task, otherwise they would be
        duplicates)."""
        return len(self.text) - len(np.unique(self.text))

    @staticmethod
    def of_source(
        name: str, candidates: Candidates, keys: NDArray[np.uint64], used: NDArray[np.int32], written: Sequence[Arrays]
    ) -> "Statistics":
        merged = {  # of no files, if no records of the source are needed
            column: np.concatenate([np.zeros(0, kind), *(arrays[column] for arrays in written)])
            for column, kind in WRITTEN.items()
        }
        places = np.minimum(np.searchsorted(keys, merged["record_keys"]), max(len(keys) - 1, 0))
        taken = (keys[places] == merged["record_keys"]) & (merged["part"] < used[places]) if len(keys) else []
        chosen = {column: values[np.asarray(taken, np.bool_)] for column, values in merged.items()}
        tasks = tuple(dict.fromkeys(task for task, _ in candidates.strata))
        task_of = np.array([tasks.index(task) for task, _ in candidates.strata], np.int32)
        count = len(chosen["length"])
        task = task_of[strata_of(candidates, chosen["record_keys"])] if count else np.zeros(0, np.int32)
        measures = {column: chosen[column] for column in ("length", "supervised", "traits", "text")}
        return Statistics((name,), tasks, np.zeros(count, np.int32), task, **measures)

    @staticmethod
    def of(parts: Sequence["Statistics"]) -> "Statistics":
        tasks = tuple(dict.fromkeys(task for part in parts for task in part.tasks))
        place = {task: index for index, task in enumerate(tasks)}
        renumbered = [np.array([place[t] for t in part.tasks], np.int32)[part.task] for part in parts]
        columns = {
            column: np.concatenate([getattr(part, column) for part in parts])
            for column in ("length", "supervised", "traits", "text")
        }
        source = np.concatenate([np.full(len(part), index, np.int32) for index, part in enumerate(parts)])
        sources = tuple(name for part in parts for name in part.sources)
        return Statistics(sources, tasks, source, np.concatenate(renumbered), **columns)
