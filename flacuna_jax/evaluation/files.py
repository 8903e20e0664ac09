"""Reads benchmark files in their published formats, with one error message for any problem of a file."""

import csv
import gzip
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flacuna_jax.errors import UserError


class Row(NamedTuple):
    """A record, and its position in a file for messages."""

    place: str
    value: dict[str, Any]


def locate(data: Path, candidates: Sequence[str], expected: str) -> Path:
    """The first of `candidates` (relative to `data`, glob patterns allowed) that exists.

    Raises:
      UserError: none exists; the message lists the candidates and the expected publication.
    """
    if not data.is_dir():
        raise UserError(f"{data}: no such directory of benchmarks (--data, or evaluation.tasks.data)")
    for candidate in candidates:
        found = sorted(data.glob(candidate)) if candidate != "." else [data]
        if found:
            return found[0]
    raise UserError(f"{data} has none of {', '.join(candidates)}; expected: {expected}")


def read_text(path: Path) -> str:
    """The text of a file, decompressed if its name ends in .gz. Raises UserError if it cannot be read."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, is not JSON: {error.msg}") from None


def read_rows(path: Path) -> list[Row]:
    """Records of a .jsonl(.gz), .json (a list, or {"examples": [...]}) or .parquet file."""
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    if ".jsonl" in path.name:
        return list(_json_lines(path))
    content = read_json(path)
    if isinstance(content, dict) and "examples" in content:
        content = content["examples"]
    if not isinstance(content, list):
        raise UserError(f'{path}: expected a JSON list or {{"examples": [...]}}, found {type(content).__name__}')
    rows = [Row(f"{path}, record {number}", value) for number, value in enumerate(content, 1)]
    return [_checked(row) for row in rows]


def _parquet_rows(path: Path) -> list[Row]:
    import pyarrow.parquet

    try:
        values = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file: {error}") from None
    return [Row(f"{path}, row {number}", value) for number, value in enumerate(values, 1)]


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number}, is not JSON: {error.msg}") from None
            yield _checked(Row(f"{path}, line {number}", value))


def _checked(row: Row) -> Row:
    if not isinstance(row.value, dict):
        raise UserError(f"{row.place}: expected an object, found {type(row.value).__name__}")
    return row


def field(row: Row, name: str, kind: type = str) -> Any:
    """`row.value[name]` of the given type. Raises UserError if it is missing or has another type."""
    if name not in row.value:
        raise UserError(f"{row.place}: no field {name!r}; fields are {', '.join(map(repr, row.value)) or 'none'}")
    value = row.value[name]
    if not isinstance(value, kind):
        raise UserError(f"{row.place}: field {name!r} must be {kind.__name__}, is {type(value).__name__}")
    return value


def read_csv(path: Path, delimiter: str = ",") -> list[list[str]]:
    """Every cell exactly as written: no type inference, and "NA" is not a missing value."""
    try:
        return [row for row in csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter) if row]
    except csv.Error as error:
        raise UserError(f"{path} is not a CSV file: {error}") from None
