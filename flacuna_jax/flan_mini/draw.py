"""Draws the items of a source: without duplicates, tasks in proportion, with replacements for items that do not fit.

The order of the items of a stratum (task, type) depends on their content and the seed. They are tried in this order;
items without a record are skipped, until the quota is full or no item is left.
"""

import fnmatch
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from flacuna_jax.flan_mini.config import MixtureSource
from flacuna_jax.flan_mini.items import hash64, ranks
from flacuna_jax.flan_mini.mixture import Stratum, quotas
from flacuna_jax.flan_mini.stages import CANDIDATE, EXEMPLAR, Drawn
from flacuna_jax.flan_mini.work import Result

UNTRIED = -1
BUCKET_ITEMS = 20_000
"""Number of candidates that one job words."""

DUPLICATE, SAME_CONVERSATION, EXCLUDED = "same content", "same conversation", "task not included"


@dataclass
class Candidates:
    """The distinct items of a source in the order in which they are tried, stratum by stratum.

    keys: uint64 [n]. starts: int64 [strata + 1], where each stratum begins. parts: int32 [n], number of records
    of each item, or UNTRIED.
    """

    strata: tuple[Stratum, ...]
    keys: NDArray[np.uint64]
    starts: NDArray[np.int64]
    parts: NDArray[np.int32]
    set_aside: Counter[str] = field(default_factory=Counter)
    """Items that are not tried, by reason."""

    def count(self, stratum: int) -> int:
        return int(self.starts[stratum + 1] - self.starts[stratum])

    def tried(self, stratum: int) -> NDArray[np.int32]:
        """The parts of the items tried so far, which are always the first ones."""
        parts = self.parts[self.starts[stratum] : self.starts[stratum + 1]]
        return parts[: int(np.searchsorted(parts == UNTRIED, True))]

    def record_outcomes(self, keys: NDArray[np.uint64], parts: NDArray[np.int32]) -> None:
        self.parts[self.places(keys)] = parts

    def places(self, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
        """The positions of items, int64 [n], by their keys."""
        return self._by_key[np.searchsorted(self.keys, keys, sorter=self._by_key)]

    @cached_property
    def _by_key(self) -> NDArray[np.int64]:
        return np.argsort(self.keys)


def gather(source: MixtureSource, scans: Sequence[Result], seed: int) -> Candidates:
    """Merges the scans of a source's files; the result does not depend on their order."""
    names: list[Stratum] = sorted({(task, type_) for scan in scans for task, type_ in scan.facts["strata"]})
    place = {name: index for index, name in enumerate(names)}
    keys = np.concatenate([scan.arrays["keys"] for scan in scans])
    stratum = np.concatenate([_renumbered(scan, place) for scan in scans])
    set_aside: Counter[str] = Counter()

    total = len(keys)
    keys, first = np.unique(keys, return_index=True)
    stratum = stratum[first]
    set_aside[DUPLICATE] = total - len(keys)

    included = np.array([_is_included(source, task) for task, _ in names], np.bool_)
    kept = included[stratum] if len(names) else np.zeros(0, np.bool_)
    set_aside[EXCLUDED] = int((~kept).sum())

    same = np.concatenate([scan.arrays["same"] for scan in scans])[first]
    if same.any():
        sizes = np.concatenate([scan.arrays["sizes"] for scan in scans])[first]
        distinct = _without_same(keys, same, sizes)
        set_aside[SAME_CONVERSATION] = int((kept & ~distinct).sum())
        kept &= distinct

    keys, stratum = keys[kept], stratum[kept]
    order = np.lexsort((ranks(keys, seed), stratum))
    starts = np.searchsorted(stratum[order], np.arange(len(names) + 1)).astype(np.int64)
    parts = np.full(len(keys), UNTRIED, np.int32)
    return Candidates(tuple(names), keys[order], starts, parts, +set_aside)


def _renumbered(scan: Result, place: dict[Stratum, int]) -> NDArray[np.int64]:
    numbers = np.array([place[task, type_] for task, type_ in scan.facts["strata"]], np.int64)
    return numbers[scan.arrays["stratum"]] if len(numbers) else np.zeros(0, np.int64)


def _is_included(source: MixtureSource, task: str) -> bool:
    included = not source.include or any(fnmatch.fnmatchcase(task, pattern) for pattern in source.include)
    return included and not any(fnmatch.fnmatchcase(task, pattern) for pattern in source.exclude)


def _without_same(keys: NDArray[np.uint64], same: NDArray[np.uint64], sizes: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Which of the items with a common mark to keep: the largest, and of equal ones the one with the smallest key."""
    seen: set[int] = set()
    stays = np.ones(len(keys), np.bool_)
    for index in np.lexsort((keys, -sizes.astype(np.int64))).tolist():
        marks = [mark for mark in same[index].tolist() if mark]
        if any(mark in seen for mark in marks):
            stays[index] = False
        else:
            seen.update(marks)
    return stays


def targets(source: MixtureSource, candidates: Candidates, wanted: int) -> dict[Stratum, int]:
    """Number of records needed of each stratum, as far as the yield of its items is known."""
    available = {name: candidates.count(i) for i, name in enumerate(candidates.strata) if candidates.count(i)}
    possible = {}
    for index, name in enumerate(candidates.strata):
        if name not in available:
            continue
        tried = candidates.tried(index)
        untried = candidates.count(index) - len(tried)
        room = int(tried.sum()) + untried
        possible[name] = min(room, source.max_per_task or room)
    return quotas(wanted, available, possible, source.shares, source.rate_cap)


def next_draw(source: MixtureSource, candidates: Candidates, wanted: dict[Stratum, int], pool: int) -> Drawn | None:
    """The items to try next to reach `wanted`; None if it is reached."""
    keys: list[NDArray[np.uint64]] = []
    purpose: list[NDArray[np.uint8]] = []
    of_stratum: list[NDArray[np.int64]] = []
    lacking: dict[int, int] = {}
    for index, name in enumerate(candidates.strata):
        tried = candidates.tried(index)
        missing = wanted.get(name, 0) - int(tried.sum())
        if missing > 0:
            # A few more than needed, since some will not fit, and another round would read the files again.
            spare = missing // 8 + (4 if len(tried) else 1)
            lacking[index] = min(candidates.count(index) - len(tried), missing + spare)
    if not lacking:
        return None
    for index, count in lacking.items():
        start, offset = int(candidates.starts[index]), len(candidates.tried(index))
        here = candidates.keys[start : int(candidates.starts[index + 1])]
        flags = np.zeros(len(here), np.uint8)
        flags[offset : offset + count] |= CANDIDATE
        if source.few_shot:
            flags[: pool + 1] |= EXEMPLAR
        picked = flags > 0
        keys.append(here[picked])
        purpose.append(flags[picked])
        of_stratum.append(np.full(int(picked.sum()), index))
    return _bucketed(candidates, np.concatenate(keys), np.concatenate(purpose), np.concatenate(of_stratum), lacking)


def _bucketed(
    candidates: Candidates,
    keys: NDArray[np.uint64],
    purpose: NDArray[np.uint8],
    of_stratum: NDArray[np.int64],
    lacking: dict[int, int],
) -> Drawn:
    """Buckets of about BUCKET_ITEMS; a larger task is split over several."""
    buckets = max(1, -(-sum(lacking.values()) // BUCKET_ITEMS))
    base = np.zeros(len(candidates.strata), np.int32)
    spread = np.ones(len(candidates.strata), np.int32)
    for index, count in lacking.items():
        base[index] = hash64("bucket", *candidates.strata[index]) % buckets
        spread[index] = min(buckets, -(-count // BUCKET_ITEMS))
    order = np.argsort(keys)
    stratum = of_stratum[order]
    return Drawn(keys[order], purpose[order], base[stratum], spread[stratum], buckets)


def accepted(candidates: Candidates, wanted: dict[Stratum, int]) -> tuple[NDArray[np.uint64], NDArray[np.int32]]:
    """Sorted keys of the items in the mixture, and the number of records of each.

    The first items are used; of the last one, only as many parts as the quota permits.
    """
    keys: list[NDArray[np.uint64]] = []
    used: list[NDArray[np.int32]] = []
    for index, name in enumerate(candidates.strata):
        tried = candidates.tried(index)
        before = np.cumsum(tried) - tried
        take = np.clip(wanted.get(name, 0) - before, 0, tried).astype(np.int32)
        start = int(candidates.starts[index])
        chosen = take > 0
        keys.append(candidates.keys[start : start + len(tried)][chosen])
        used.append(take[chosen])
    all_keys = np.concatenate(keys) if keys else np.zeros(0, np.uint64)
    all_used = np.concatenate(used) if used else np.zeros(0, np.int32)
    order = np.argsort(all_keys)
    return all_keys[order], all_used[order]
