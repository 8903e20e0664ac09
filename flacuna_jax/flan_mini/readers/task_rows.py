"""Rows of raw datasets (jsonl, json, parquet, csv, tsv) as items of a template family, by a mapping in the config.

`fields` maps the family's placeholders to columns; a column inside a column is written with a dot ("answers.text").
`options` may name a list column, or several columns with commas between them. `labels` maps values of the answer
column to the model's answers, and then its values are the options. Without labels, an answer that is the number or the
letter of an option means that option.
"""

import csv
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import pyarrow
import pyarrow.parquet

from flacuna_jax.data.files import DataFiles, Place, RawRecord, kind_of, read_records
from flacuna_jax.data.formats import BadRecord
from flacuna_jax.data.report import BadRecordPolicy
from flacuna_jax.errors import UserError
from flacuna_jax.flan_mini.config import MixtureSource, TaskConfig
from flacuna_jax.flan_mini.items import Item
from flacuna_jax.flan_mini.readers.common import Items, Reader, attempt, filled

_TABLES = {".csv": ",", ".tsv": "\t"}


def _files(source: MixtureSource, task: TaskConfig) -> list[Path]:
    root = Path(source.path)
    files = sorted(path for path in root.glob(task.files) if path.is_file())
    usable = [path for path in files if kind_of(path) is not None]
    if not usable:
        raise UserError(f"{root}: no data file matches {task.files!r} (task {task.name})")
    return usable


def _find(source: MixtureSource) -> DataFiles:
    return DataFiles(tuple(sorted({path for task in source.tasks for path in _files(source, task)})), ())


def all_columns(path: Path) -> tuple[str, ...]:
    """The columns of a parquet file; empty for other files, and for a damaged one, which is reported when it is
    read."""
    if not path.name.endswith(".parquet"):
        return ()
    try:
        return tuple(pyarrow.parquet.read_schema(path).names)
    except (pyarrow.ArrowException, OSError):
        return ()


def _read(source: MixtureSource, path: Path, policy: BadRecordPolicy) -> Items:
    for task in source.tasks:
        if path not in _files(source, task):
            continue
        for place, record, _ in _rows(path, policy):
            policy.report.read += 1
            for item in attempt(policy, f"{place}, task {task.name}", lambda: [_convert(task, record)]):  # noqa: B023
                yield place, item


def _rows(path: Path, policy: BadRecordPolicy) -> Iterator[RawRecord]:
    delimiter = next((d for suffix, d in _TABLES.items() if path.name.endswith(suffix)), None)
    if delimiter is None:
        yield from read_records(path, all_columns(path), policy)
        return
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = _table(file, delimiter)
            for number, row in enumerate(reader, start=1):
                yield RawRecord(Place(path, number, reader.line_num), row)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        policy.report.read += 1
        policy.reject("unreadable rest of a file", Place(path, number + 1, number + 2), str(error))


def _table(file: TextIO, delimiter: str) -> "csv.DictReader[str]":
    """Quotes have a meaning in csv; in the tsv files of older benchmarks they are plain text."""
    if delimiter == ",":
        return csv.DictReader(file)
    return csv.DictReader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE)


def _convert(task: TaskConfig, record: Any) -> Item:
    if not isinstance(record, Mapping):
        raise BadRecord("wrong type", f"a record must be an object, not {type(record).__name__}")
    fields: dict[str, Any] = {}
    for placeholder, column in task.fields.items():
        if placeholder == "options":
            fields["options"] = _options(record, column)
        else:
            fields[placeholder] = _value(record, column)
    if task.labels is not None:
        label = fields.get("answer", "")
        if label not in task.labels:
            raise BadRecord("unknown label", f"label {label!r} is not one of {', '.join(map(repr, task.labels))}")
        fields["answer"] = task.labels[label]
        fields.setdefault("options", list(dict.fromkeys(task.labels.values())))
    elif "options" in fields:
        fields["answer"] = _option(fields.get("answer", ""), fields["options"])
    for name, value in fields.items():
        if isinstance(value, str):
            fields[name] = filled(value, name)
    return Item(task.name, task.family, fields)


def _look_up(record: Mapping[str, Any], column: str) -> Any:
    value: Any = record
    for part in column.split("."):
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, Mapping) and part in value:
            value = value[part]
        else:
            raise BadRecord(
                "field missing", f"the record has no {column!r} (its fields: {', '.join(list(record)[:10])})"
            )
    return value


def _value(record: Mapping[str, Any], column: str) -> str:
    value = _look_up(record, column)
    if isinstance(value, list) and value and isinstance(value[0], str):
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRecord("wrong type", f"{column!r} must be text or a number, not {type(value).__name__}")
    return str(value)


def _options(record: Mapping[str, Any], columns: str) -> list[str]:
    if "," in columns:
        return [_value(record, column.strip()) for column in columns.split(",")]
    value = _look_up(record, columns)
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(option, str) for option in value):
        raise BadRecord("wrong type", f"{columns!r} must be a list of at least two texts")
    return list(value)


def _option(answer: str, options: list[str]) -> str:
    if answer in options:
        return answer
    if re.fullmatch(r"\d+", answer) and int(answer) < len(options):
        return options[int(answer)]
    if re.fullmatch(r"[A-Za-z]", answer) and ord(answer.upper()) - 65 < len(options):
        return options[ord(answer.upper()) - 65]
    raise BadRecord("unknown label", f"the answer {answer!r} is not one of the {len(options)} options or their numbers")


READER = Reader(_find, _read)
