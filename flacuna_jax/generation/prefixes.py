"""Plans which token sequences share a prefix that is computed once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SMALLEST_SAVING = 512
"""Minimum number of tokens that a prefix must save to be worth a separate pass."""


@dataclass(frozen=True)
class Group:
    """Members (indices into the sequences) that begin with the same `length` tokens; 0 means no shared prefix."""

    length: int
    members: tuple[int, ...]


def plan_prefixes(sequences: Sequence[Sequence[int]], shareable: Sequence[int]) -> list[Group]:
    """Groups of sequences, each with the prefix that its members share; every sequence is in exactly one group.

    Args:
      sequences: token ids.
      shareable: maximum number of leading tokens of each sequence that may become a prefix.

    Sequences are visited in sorted order, in which neighbours share the most tokens. A sequence joins the current group
    if shortening the group's prefix for it costs fewer tokens, over all members, than sharing the prefix saves.
    """
    order = sorted(range(len(sequences)), key=lambda index: tuple(sequences[index]))
    arrays = [np.asarray(sequence, np.int64) for sequence in sequences]
    groups: list[Group] = []
    alone: list[int] = []
    members: list[int] = []
    length = 0

    def close() -> None:
        if (len(members) - 1) * length >= SMALLEST_SAVING:
            groups.append(Group(length, tuple(members)))
        else:
            alone.extend(members)

    for index in order:
        if members:
            common = min(length, shareable[index], _common(arrays[members[-1]], arrays[index]))
            if common and common > (length - common) * (len(members) - 1):
                length = common
                members.append(index)
                continue
            close()
        members, length = [index], shareable[index]
    if members:
        close()
    return ([Group(0, tuple(sorted(alone)))] if alone else []) + groups


def _common(a: np.ndarray, b: np.ndarray) -> int:
    shorter = min(a.size, b.size)
    different = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(different[0]) if different.size else shorter
