"""Packs examples into rows: a plan over all lengths at once, which is a pure function of (lengths, seed, epoch).

No random number generator of a library is used: orders come from a hash of (seed, epoch, index), so that a plan is the
same on every machine and with every version of NumPy.

Examples are placed longest first, with equal lengths in shuffled order (best-fit and first-fit *decreasing*). On
lengths like FLAN's this fills 99.8 % of the rows, while a shuffled order leaves 1.2 % empty. Then the rows are
shuffled, so that a batch is a sample of the epoch. Best-fit selects the fullest row with enough free space. It finds
that row by its free space, an integer of at most max_length, with a bit set of the values that occur, so placing an
example costs the same for a thousand rows as for a million.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

PackingMethod = Literal["best_fit", "first_fit", "none"]


@dataclass(frozen=True)
class PackPlan:
    """Row r holds examples[row_offsets[r] : row_offsets[r + 1]], in this order.

    row_offsets: int64 [rows + 1]. examples: int64 [examples], indices into the packed lengths.
    """

    row_offsets: NDArray[np.int64]
    examples: NDArray[np.int64]

    @property
    def rows(self) -> int:
        return len(self.row_offsets) - 1

    def row(self, index: int) -> NDArray[np.int64]:
        return self.examples[self.row_offsets[index] : self.row_offsets[index + 1]]


def permutation(size: int, *key: int) -> NDArray[np.int64]:
    """A shuffled range(size), int64 [size], which depends only on the key."""
    return np.argsort(hashes(size, *key), kind="stable")


def hashes(size: int, *key: int) -> NDArray[np.uint64]:
    """uint64 [size] of a SplitMix64 hash of each index and the key (Steele, Lea, Flood, 2014)."""
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _mix(state ^ _mix(np.array([part & 0xFFFFFFFFFFFFFFFF], np.uint64)))
    return _mix(state + np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


# Different uses of one (seed, epoch) use different streams.
_EXAMPLE_ORDER, _ROW_ORDER, _SUBSET = 1, 2, 3


def epoch_examples(
    source_index: NDArray[np.integer[Any]], weights: Sequence[float], seed: int, epoch: int
) -> NDArray[np.int64]:
    """The examples of one epoch, int64, in which each source is repeated according to its weight.

    source_index: int [examples]. A weight w gives floor(w) whole passes over its source and a subset of
    round((w - floor(w)) × size) examples, drawn with (seed, epoch, source), so every epoch has another subset.
    """
    chosen: list[NDArray[np.int64]] = []
    for source, weight in enumerate(weights):
        members = np.flatnonzero(source_index == source).astype(np.int64)
        passes = int(weight)
        part = round((weight - passes) * len(members))
        chosen += [members] * passes
        if part:
            chosen.append(np.sort(members[permutation(len(members), seed, epoch, _SUBSET, source)[:part]]))
    return np.concatenate(chosen) if chosen else np.zeros(0, np.int64)


def pack(lengths: NDArray[np.integer[Any]], max_length: int, method: PackingMethod, seed: int, epoch: int) -> PackPlan:
    """Packs examples of the given lengths (int [examples], each 1 to max_length tokens) into rows of max_length.

    Raises ValueError for a length outside of that range.
    """
    if len(lengths) and not (lengths.min() >= 1 and lengths.max() <= max_length):
        raise ValueError(f"lengths must be between 1 and {max_length}")
    order = permutation(len(lengths), seed, epoch, _EXAMPLE_ORDER)
    if method == "none":
        return PackPlan(np.arange(len(order) + 1, dtype=np.int64), order)
    order = order[np.argsort(-lengths[order].astype(np.int64), kind="stable")]
    assign = _best_fit if method == "best_fit" else _first_fit
    row_of = np.array(assign(lengths[order].tolist(), max_length), np.int64)
    rows = int(row_of.max()) + 1 if len(row_of) else 0
    # Row r of the packing becomes row place[r] of the plan.
    place = permutation(rows, seed, epoch, _ROW_ORDER)
    row_of = place[row_of]
    row_offsets = np.zeros(rows + 1, np.int64)
    np.cumsum(np.bincount(row_of, minlength=rows), out=row_offsets[1:])
    return PackPlan(row_offsets, order[np.argsort(row_of, kind="stable")])


def _best_fit(lengths: list[int], capacity: int) -> list[int]:
    """The row of each example: the fullest one with enough free space, or else a new one."""
    rows_with_room: list[list[int]] = [[] for _ in range(capacity)]
    rooms = 0  # bit set of the free spaces for which rows_with_room is not empty
    rows = 0
    row_of: list[int] = []
    for length in lengths:
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            candidates = rows_with_room[room]
            row = candidates.pop()
            if not candidates:
                rooms ^= 1 << room
            room -= length
        else:
            row = rows
            rows += 1
            room = capacity - length
        if room:
            rows_with_room[room].append(row)
            rooms |= 1 << room
        row_of.append(row)
    return row_of


def _first_fit(lengths: list[int], capacity: int) -> list[int]:
    """The row of each example: the earliest opened one with enough free space, or else a new one.

    Best fit never needs more rows on the lengths we measured. This stays because `packing: first_fit` is a setting that
    runs were started with: it is in their checkpoints, and resuming one must lay out the same rows.

    For each free room a heap of its rows, and over the rooms a tree of the smallest row in any larger room: entry
    `leaves + room` is the heap's top, every other entry the smaller of its two children.
    """
    leaves = 1 << capacity.bit_length()
    none = len(lengths)
    smallest = [none] * (2 * leaves)
    heaps: list[list[int]] = [[] for _ in range(capacity + 1)]

    def update(room: int) -> None:
        node = leaves + room
        smallest[node] = heaps[room][0] if heaps[room] else none
        while node > 1:
            node >>= 1
            value = min(smallest[2 * node], smallest[2 * node + 1])
            if smallest[node] == value:
                break
            smallest[node] = value

    def first_with(length: int) -> int:
        node = leaves + length
        found = smallest[node]
        while node > 1:
            if not node & 1:
                found = min(found, smallest[node + 1])
            node >>= 1
        return found

    rows = 0
    room_of: list[int] = []
    row_of: list[int] = []
    for length in lengths:
        row = first_with(length)
        if row == none:
            row = rows
            rows += 1
            room_of.append(capacity - length)
        else:
            old = room_of[row]
            heapq.heappop(heaps[old])
            update(old)
            room_of[row] = old - length
        heapq.heappush(heaps[room_of[row]], row)
        update(room_of[row])
        row_of.append(row)
    return row_of
