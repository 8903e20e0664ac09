"""Datasets of the Hugging Face Hub: hf:NAME[@REVISION][:CONFIG[:SPLIT]]. Their files are read like local ones.

Configurations and splits are those of the dataset card (`configs` in README.md), as in `datasets`. Without them, a
configuration is a directory, and the split is part of a file's name.
"""

import functools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import yaml

from flacuna_jax.data.raw import KNOWN_SUFFIXES, is_data_file
from flacuna_jax.data.splits import is_of_split, label_of, split_of
from flacuna_jax.errors import UserError
from flacuna_jax.hub import PREFIX, HubName, fetch

FORM = "hf:NAME[@REVISION][:CONFIG[:SPLIT]]"
CARD = "README.md"
TRAIN = "train"


@dataclass(frozen=True)
class DatasetName:
    repository: HubName
    config: str | None = None
    split: str | None = None

    @staticmethod
    def parse(text: str, split: str | None = None) -> "DatasetName":
        """Parses a path. `split` is the separate setting; raises UserError if the path has another one."""
        repository, _, rest = text.removeprefix(PREFIX).partition(":")
        config, _, in_path = rest.partition(":")
        if split is not None and in_path and in_path != split:
            raise UserError(f"{text}: the path has split {in_path}, but split: {split} is another")
        return DatasetName(HubName.parse(PREFIX + repository, FORM), config or None, split or in_path or None)

    def __str__(self) -> str:
        return f"{self.repository}" + (f":{self.config}" if self.config else "")


class DatasetFiles(NamedTuple):
    """Files of a dataset in the cache of the Hub.

    Attributes:
      root: the directory that contains all of them.
      files: in reading order.
      note: for the report: which revision and split they are.
    """

    root: Path
    files: tuple[Path, ...]
    note: str


@functools.cache
def dataset_files(path: str, split: str | None = None) -> DatasetFiles:
    """The files of a dataset's split, by default of the training split; downloads those that are not in the cache.

    Args:
      path: hf:NAME[@REVISION][:CONFIG[:SPLIT]].
      split: the same as SPLIT.

    Raises:
      UserError: the dataset cannot be downloaded, it has no such configuration or split, or its configuration must be
        named.
    """
    name = DatasetName.parse(path, split)
    described = fetch(name.repository, "dataset", _card)
    card = _read_card(described.directory / CARD, name) if described.files else {}
    # The same commit as that of the card.
    commit = HubName(name.repository.name, described.directory.name)
    snapshot = fetch(commit, "dataset", functools.partial(_choose, name, card))
    files = tuple(snapshot.directory / file for file in snapshot.files)
    root = Path(os.path.commonpath([file.parent for file in files]))
    amount = f"{len(files)} file{'s' if len(files) != 1 else ''}"
    return DatasetFiles(root, files, f"revision {commit.revision}, split {name.split or TRAIN}: {amount}")


def _card(files: Sequence[str]) -> list[str]:
    return [file for file in files if file == CARD]


def _read_card(path: Path, name: DatasetName) -> Mapping[str, Any]:
    """The configurations of a dataset card by name; empty if it does not list any."""
    front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", path.read_text(encoding="utf-8-sig"), re.DOTALL)
    try:
        tree = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError as error:
        raise UserError(
            f"{name}: the dataset card ({path}) is not valid YAML: {' '.join(str(error).split())}"
        ) from None
    configs = tree.get("configs") if isinstance(tree, dict) else None
    entries = [entry for entry in configs or [] if isinstance(entry, dict)]
    return {str(entry.get("config_name", "default")): entry for entry in entries}


def _choose(name: DatasetName, card: Mapping[str, Any], files: Sequence[str]) -> list[str]:
    """The files of a split, in the order of their names."""
    found = [file for file in files if is_data_file(Path(file)) and not file.startswith(".")]
    entry = _configuration(name, card)
    by_split = {} if entry is None else _patterns(entry)
    if by_split:
        wanted = name.split or TRAIN
        if wanted not in by_split:
            raise UserError(f"{name} has no split {wanted}; it has {', '.join(by_split)}: write {FORM}")
        patterns = [re.compile(_as_expression(pattern)) for pattern in by_split[wanted]]
        chosen = [file for file in found if any(pattern.fullmatch(file) for pattern in patterns)]
    else:
        directory = name.config if entry is None else entry.get("data_dir")
        below = [file for file in found if directory is None or directory in _directories(file)]
        chosen = [file for file in below if _is_wanted(file, name.split)]
        if not chosen and below:
            names = sorted({label_of(Path(file)) for file in below})
            raise UserError(f"{name} has no split {name.split or TRAIN}; it has {', '.join(names[:10])}: write {FORM}")
    if not chosen:
        where = "" if name.config is None else f" in a configuration or directory {name.config}"
        known = sorted({*card, *(part for file in found for part in _directories(file))})
        others = f"; its configurations and directories are {', '.join(known[:20])}" if known else ""
        raise UserError(f"{name} has no data file{where} that ends in one of {KNOWN_SUFFIXES}{others}")
    return chosen


def _configuration(name: DatasetName, card: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The named configuration, or else the card's default; None if the card has no configuration of the name."""
    if name.config is not None:
        return card.get(name.config)
    default = [config for config, entry in card.items() if entry.get("default") is True or config == "default"]
    if len(card) > 1 and not default:
        raise UserError(f"{name} has several configurations: {', '.join(list(card)[:20])}; name one of them: {FORM}")
    return card[default[0]] if default else next(iter(card.values()), None)


def _patterns(entry: Mapping[str, Any]) -> dict[str, list[str]]:
    """The patterns of a configuration's files, by split; empty if it has none."""
    value = entry.get("data_files")
    if isinstance(value, dict):
        value = [{"split": split, "path": path} for split, path in value.items()]
    entries = value if isinstance(value, list) else [] if value is None else [value]
    prefix = f"{str(entry['data_dir']).strip('/')}/" if entry.get("data_dir") else ""
    by_split: dict[str, list[str]] = {}
    for item in entries:
        split, path = (item.get("split", TRAIN), item.get("path")) if isinstance(item, dict) else (TRAIN, item)
        paths = path if isinstance(path, list) else [path]
        by_split.setdefault(str(split), []).extend(f"{prefix}{one}" for one in paths)
    return by_split


def _as_expression(pattern: str) -> str:
    """A pattern of `datasets` as a regular expression: * is within a directory, ** across directories."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.removeprefix("./"))
    wild = {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(wild.get(part, re.escape(part)) for part in parts)


def _directories(file: str) -> list[str]:
    """The paths and the names of the directories that contain a file."""
    parents = PurePosixPath(file).parents
    return [text for parent in parents if parent.name for text in dict.fromkeys((str(parent), parent.name))]


def _is_wanted(file: str, split: str | None) -> bool:
    return split_of(Path(file)) in (None, TRAIN) if split is None else is_of_split(Path(file), split)
