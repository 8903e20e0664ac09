"""Rows that already have their wording: the FLAN v2 submixes and P3, in all published layouts.

submix jsonl/parquet   inputs, targets, task_source, task_name, template_type
per-type jsonl.gz      inputs, targets, task; the template type is in the file's name ({sub}_{fs|zs}_{opt|noopt}_train)
seqio export, P3       inputs_pretokenized, targets_pretokenized, _task_name, _template_type
full dump              source, target, task_name, task_source, template_type

A row with a template type (its own or that of its file) is kept unchanged. A row without one, as in P3, is a pair that
can be grouped with exemplars of its task. P3 rows do not have a task name; it is the name of their directory or file.
"""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from flacuna_jax.data.files import Place
from flacuna_jax.data.formats import BadRecord
from flacuna_jax.data.report import BadRecordPolicy
from flacuna_jax.flan_mini.config import FLAN_TYPES, MixtureSource
from flacuna_jax.flan_mini.items import PAIR, READY, Item
from flacuna_jax.flan_mini.readers.common import Items, Reader, each, filled, find_training, optional, text_of

# P3 has token ids under inputs and targets, in addition to the text.
_INPUTS = ("inputs_pretokenized", "inputs", "source")
_TARGETS = ("targets_pretokenized", "targets", "target")
_TASK = ("task_name", "_task_name", "task")
_TYPE = ("template_type", "_template_type")
_COLUMNS = (*_INPUTS, *_TARGETS, *_TASK, *_TYPE)


def _read(source: MixtureSource, path: Path, policy: BadRecordPolicy) -> Items:
    relative = path.relative_to(source.path) if path != Path(source.path) else Path(path.name)
    return each(path, _COLUMNS, policy, partial(_convert, relative))


def _convert(file: Path, _: Place, record: Mapping[str, Any]) -> Iterator[Item]:
    fields = {
        "inputs": filled(text_of(record, *_INPUTS), "input"),
        "targets": filled(text_of(record, *_TARGETS), "target"),
    }
    task = optional(record, *_TASK) or _task_of_file(file)
    type_ = optional(record, *_TYPE) or _type_of_file(file.name)
    if type_ and type_ not in FLAN_TYPES:
        raise BadRecord("unknown template type", f"template type {type_!r} is not one of {', '.join(FLAN_TYPES)}")
    yield Item(task, READY if type_ else PAIR, fields, type_)


def _type_of_file(name: str) -> str:
    found = re.search(r"(?:^|_)(zs|fs)_(opt|noopt)(?=_|\.|-|$)", name)
    return f"{found[1]}_{found[2]}" if found else ""


def _task_of_file(file: Path) -> str:
    """The directory below the source's path, or else the file's name without split and shard numbers."""
    if len(file.parts) > 1:
        return file.parts[0]
    return re.sub(r"[-_.](train|data|part)?[-_.]?\d*(-of-\d+)?$", "", file.name.split(".")[0]) or file.name


READER = Reader(find_training, _read)
