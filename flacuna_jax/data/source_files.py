"""The files of a source (one file, a directory, a glob or a dataset of the Hub), and their descriptions.

From a directory with several splits, the source's `split` is read, or else every split that is not for validation or
test by its name. Names are interpreted like those of `datasets`: train-00000-of-00001.parquet, test.jsonl,
validation/part-1.json. For a directory that `datasets` wrote with save_to_disk, the files are those that it lists.
"""

import dataclasses
import glob
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flacuna_jax.data.dataset_info import FileDescription, read_descriptions
from flacuna_jax.data.hub import dataset_files
from flacuna_jax.data.raw import DESCRIPTIONS, KNOWN_SUFFIXES, is_data_file, kind_of
from flacuna_jax.data.splits import is_of_split, label_of, split_of
from flacuna_jax.errors import UserError
from flacuna_jax.hub import is_hub_name, snapshot_of


class DataFiles(NamedTuple):
    files: tuple[Path, ...]
    ignored: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class SourceFiles:
    """The files of a source.

    Attributes:
      root: The directory that file names are relative to: the directory itself, or the parent of a file.
      files: The data files, in reading order.
      ignored: Files that are not data files by their names.
      notes: Sentences for the report: which split was read, what was left out.
      descriptions: The entries of LLaMA-Factory's dataset_info.json, by file.
    """

    root: Path
    files: tuple[Path, ...]
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    descriptions: Mapping[Path, FileDescription] = dataclasses.field(default_factory=dict)


def find_files(path: Path, setting: str = "data.sources") -> DataFiles:
    """The data files of a path: the file itself, or every data file below a directory, of all splits, sorted by path.

    Hidden files are skipped. Raises UserError for a path that does not exist or has no data file; `setting` is the name
    of the path's setting, for messages.
    """
    if path.is_file():
        _require_data_file(path)
        return DataFiles((path,), ())
    if not path.is_dir():
        if glob.has_magic(str(path)):
            return _glob(path, setting)
        looks_like_hub = not path.is_absolute() and len(path.parts) == 2 and not path.suffix
        hint = f"; for a dataset of the Hub, write hf:{path}" if looks_like_hub else ""
        raise UserError(f"{path}: no such file or directory ({setting}){hint}")
    everything = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    files = tuple(file for file in everything if is_data_file(file))
    ignored = tuple(str(file.relative_to(path)) for file in everything if not kind_of(file))
    if not files:
        found = f"; it contains {', '.join(ignored[:5])}" if ignored else ""
        raise UserError(f"{path}: the directory has no file that ends in one of {KNOWN_SUFFIXES}{found}")
    return DataFiles(_as_saved(path, files), ignored)


def source_files(path: str, split: str | None = None) -> SourceFiles:
    """The files that a source is read from. Raises UserError for a path without any, or without the wanted `split`."""
    if is_hub_name(path):
        dataset = dataset_files(path, split)
        return SourceFiles(dataset.root, dataset.files, notes=(dataset.note,))
    root = snapshot_of(Path(path))
    found = find_files(root)
    if not root.is_dir():
        if root.is_file():
            root = root.parent
            if split is not None and not is_of_split(Path(found.files[0].name), split):
                raise UserError(
                    f"{found.files[0]}: split: {split} selects files of a directory, but this is a file; remove split"
                )
            described = root
        else:
            root = described = _fixed_part(root)
            if split is not None:
                found = _of_split(root, found, split)[0]
        notes: tuple[str, ...] = ()
    else:
        described = root
        found, notes = _of_split(root, found, split) if split is not None else _training(root, found)
    descriptions = {
        file: description for file, description in read_descriptions(described).items() if file in set(found.files)
    }
    return SourceFiles(root, found.files, found.ignored, notes, descriptions)


def _of_split(root: Path, found: DataFiles, split: str) -> tuple[DataFiles, tuple[str, ...]]:
    files = tuple(file for file in found.files if is_of_split(file.relative_to(root), split))
    if not files:
        names = sorted({label_of(file.relative_to(root)) for file in found.files})
        raise UserError(f"{root}: no file has split: {split}; available are {', '.join(names[:10])}")
    if len(files) == len(found.files):
        return found, ()
    return DataFiles(files, found.ignored), (f"split {split}: {len(files)} of {_count(found.files)} read",)


def _training(root: Path, found: DataFiles) -> tuple[DataFiles, tuple[str, ...]]:
    """Removes the files of held-out splits, and lists them in a note."""
    splits = {file: split_of(file.relative_to(root)) for file in found.files}
    files = tuple(file for file in found.files if splits[file] in (None, "train"))
    left = [file.relative_to(root) for file in found.files if splits[file] not in (None, "train")]
    if not files:
        names = sorted({label_of(file) for file in left})
        raise UserError(
            f"{root}: by their names, all of its data files are for validation or test ({', '.join(names[:10])}); "
            f"to train on one of them, set split: {names[0]} in this source"
        )
    if not left:
        return found, ()
    taken = "split train" if "train" in splits.values() else "files of other splits"
    shown = ", ".join(map(str, left[:5])) + (", ..." if len(left) > 5 else "")
    note = f"{taken}: {_count(files)} read; left out as validation or test by name: {shown} (split: selects others)"
    return DataFiles(files, found.ignored), (note,)


def _count(files: Sequence[Path]) -> str:
    return f"{len(files)} file{'s' if len(files) != 1 else ''}"


def _require_data_file(path: Path) -> None:
    if path.name in DESCRIPTIONS:
        raise UserError(f"{path}: this file describes data files and has no records; give its directory, {path.parent}")
    if kind_of(path) is None:
        hint = (
            '; write each text as a line {"text": "..."} of a .jsonl file and set format: text'
            if path.suffix.lower() in (".txt", ".md")
            else ""
        )
        raise UserError(f"{path}: the name does not end in one of {KNOWN_SUFFIXES}{hint}")


def _glob(pattern: Path, setting: str) -> DataFiles:
    found = sorted(Path(name) for name in glob.glob(str(pattern), recursive=True) if Path(name).is_file())
    files = tuple(file for file in found if is_data_file(file))
    if not files:
        names = ", ".join(file.name for file in found[:3])
        what = f"matches {names}, none of which" if found else "matches no file that"
        raise UserError(f"{pattern}: the pattern {what} ends in one of {KNOWN_SUFFIXES} ({setting})")
    return DataFiles(files, tuple(str(file) for file in found if not kind_of(file)))


def _fixed_part(pattern: Path) -> Path:
    """The directory before the first wildcard."""
    parts = list(pattern.parts)
    first = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    return Path(*parts[:first])


def _as_saved(path: Path, files: tuple[Path, ...]) -> tuple[Path, ...]:
    """`files`, with only those listed in state.json, in that order, for each directory written by save_to_disk."""
    saved = {state.parent: _listed(state) for state in sorted(path.rglob("state.json"))}
    saved = {directory: listed for directory, listed in saved.items() if listed}
    return tuple(_in_saved_order(files, saved)) if saved else files


def _in_saved_order(files: Sequence[Path], saved: Mapping[Path, list[Path]]) -> Iterator[Path]:
    done: set[Path] = set()
    for file in files:
        if file.parent not in saved:
            yield file
        elif file.parent not in done:
            done.add(file.parent)
            for listed in saved[file.parent]:
                if not listed.is_file():
                    raise UserError(f"{listed}: no such file, though {file.parent / 'state.json'} lists it")
                yield listed


def _listed(state: Path) -> list[Path]:
    try:
        tree: Any = json.loads(state.read_text(encoding="utf-8-sig"))
        return [state.parent / entry["filename"] for entry in tree["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
