"""An item: one thing a source has to teach, not yet worded; and the keys that tell items apart and order them.

The order in which items are drawn is a hash of (seed, content). It depends on nothing else, so neither the order of
files nor the number of workers can change what is drawn.
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
"""Families that need no template: a row that is worded already (READY), a conversation, a worded row that may still be
grouped with exemplars (PAIR)."""


@dataclass(frozen=True, slots=True)
class Item:
    """`task` becomes the record's `source`; `family` names the templates; `type` is what the source's shares weigh.

    same_as: marks of which one in common makes two items duplicates (besides equal content, which always does);
      the item with the larger `size` stays, and of equals the one with the smaller key.
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
    """64 bits of a hash of the parts; no two sequences of parts are confused."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return int.from_bytes(digest.digest(), "little")


def ranks(keys: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """Places in a random order that (seed, key) decide, uint64 [n]; different keys get different places.

    The finaliser of splitmix64, a bijection, over the key moved by a hash of the seed.
    """
    z = keys + np.uint64(hash64("order", str(seed)))
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def chooser(seed: int, purpose: str, key: int) -> Random:
    """A random stream of one item's own."""
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
