"""The split that a data file belongs to, by its name, as in `datasets`."""

import re
from collections.abc import Mapping
from pathlib import Path

_SPLIT_WORDS: Mapping[str, frozenset[str]] = {
    "train": frozenset({"train", "training"}),
    "validation": frozenset({"validation", "valid", "val", "dev"}),
    "test": frozenset({"test", "testing", "eval", "evaluation"}),
}


def split_of(path: Path) -> str | None:
    """The split of a relative path by the words in it: train, validation or test; None if it has none of them.

    The extensions of the file name do not count. "train" anywhere takes precedence, for example over a dataset named
    "dev".
    """
    words = [set(re.split(r"[^a-z]+", part.lower())) for part in (*path.parts[:-1], path.name.split(".")[0])]
    return next((name for name, known in _SPLIT_WORDS.items() if any(part & known for part in words)), None)


def is_of_split(path: Path, split: str) -> bool:
    """Whether a relative path belongs to a split, which may have any name."""
    wanted = split_of(Path(split))
    return _exact_split(path) == split or (wanted is not None and split == wanted and split_of(path) == wanted)


def label_of(path: Path) -> str:
    """The name of the split of a relative path, for messages."""
    return _exact_split(path) or split_of(path) or path.name


def _exact_split(path: Path) -> str | None:
    """The exact name of the split in names of the Hub and save_to_disk: train_sft in
    train_sft-00000-of-00001.parquet."""
    sharded = re.fullmatch(r"(.+?)-\d{5}-of-\d{5}(-[0-9a-f]+)?", path.name.split(".")[0])
    if sharded and sharded[1] != "data":
        return sharded[1].rpartition("-")[2]
    return path.parts[-2] if len(path.parts) > 1 else path.name.split(".")[0]
