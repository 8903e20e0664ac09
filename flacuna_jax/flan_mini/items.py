"""An item: one unit of content of a source, without wording; and the keys that identify and order items.

The order in which items are drawn depends only on a hash of (seed, content), not on the order of files or the number of
workers.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

Fields = Mapping[str, Any]
"""JSON values by placeholder name."""

READY, DIALOGUE, PAIR = "ready", "dialogue", "pair"
"""Families without a template: a row that already has its wording (READY), a conversation, and a row with wording that
can be grouped with exemplars (PAIR)."""


@dataclass(frozen=True, slots=True)
class Item:
    """`task` becomes the record's `source`; `family` names the templates; the source's shares weight each `type`.

    same_as: marks; two items with a common mark are duplicates (as are items with equal content). The item with the
      larger `size` is kept, and of equal sizes the one with the smaller key.
    """

    task: str
    family: str
    fields: Fields
    type: str = ""
    same_as: tuple[str, ...] = ()
    size: int = 0

    def key(self) -> int:
        """64 bits of a hash of the content."""
        return hash64(self.task, self.family, self.type, json.dumps(self.fields, sort_keys=True))

    def to_json(self) -> str:
        return json.dumps([self.task, self.family, self.fields, self.type])


def item_from_json(text: str) -> Item:
    return Item(*json.loads(text))


def hash64(*parts: str) -> int:
    """64 bits of a hash of the parts, which distinguishes all sequences of parts."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return int.from_bytes(digest.digest(), "little")


def ranks(keys: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Positions in a random order that depends on (seed, key), uint64 [n]; different keys get different positions.

    Applies the finaliser of splitmix64, a bijection, to the key plus a hash of the seed.
    """
    z = keys + np.uint64(hash64("order", str(seed)))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def chooser(seed: int, purpose: str, key: int) -> Random:
    """A random stream for one item."""
    return Random(hash64(str(seed), purpose, str(key)))


def bad_unicode(value: object) -> bool:
    """Whether any text in a JSON value cannot be written as UTF-8 (half a surrogate pair)."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return True
        return False
    if isinstance(value, Mapping):
        return any(bad_unicode(part) for part in value.values())
    if isinstance(value, Sequence):
        return any(bad_unicode(part) for part in value)
    return False
