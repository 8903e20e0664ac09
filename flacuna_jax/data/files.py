"""Raw records from .json, .jsonl, .jsonl.gz and .parquet files, streamed in bounded memory, each with its place.

Everything that can be wrong with a file is a UserError that names the file and the line (or row); damage that begins at
one record is handed to the BadRecordPolicy, which may count it instead. A JSON list cannot be entered again behind a
syntax error, so there the rest of the file counts as one unreadable record.
"""

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow
import pyarrow.parquet

from flacuna_jax.data.report import BadRecordPolicy
from flacuna_jax.errors import UserError

SUFFIXES = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".parquet")

CHUNK = 4 << 20
"""Bytes read at once."""
LONGEST_RECORD = 256 << 20
"""Characters after which a JSON record without an end is given up, so that a torn file cannot fill the memory."""


class Place(NamedTuple):
    """Where a record is: `number` counts records or rows from 1, `line` is 0 where lines mean nothing (parquet)."""

    path: Path
    number: int
    line: int

    def __str__(self) -> str:
        if not self.line:
            return f"{self.path}, row {self.number}"
        return f"{self.path}, line {self.line} (record {self.number})"


class RawRecord(NamedTuple):
    place: Place
    value: Any


class DataFiles(NamedTuple):
    files: tuple[Path, ...]
    ignored: tuple[str, ...]


def find_files(path: Path, setting: str = "data.sources") -> DataFiles:
    """The data files of a source: itself, or every data file below a directory, sorted by path.

    Hidden files are no part of a source. Raises UserError for a path that is missing or holds no data file; `setting`
    is where the path comes from.
    """
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"{path}: the name does not end in one of {', '.join(SUFFIXES)}")
        return DataFiles((path,), ())
    if not path.is_dir():
        looks_like_hub = not path.is_absolute() and len(path.parts) == 2 and not path.suffix
        hint = f"; a dataset of the hub is written hf:{path}" if looks_like_hub else ""
        raise UserError(f"{path}: no such file or directory ({setting}){hint}")
    everything = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    files = tuple(file for file in everything if file.name.endswith(SUFFIXES))
    ignored = tuple(str(file.relative_to(path)) for file in everything if not file.name.endswith(SUFFIXES))
    if not files:
        raise UserError(f"{path}: the directory holds no file that ends in one of {', '.join(SUFFIXES)}")
    return DataFiles(files, ignored)


def read_records(path: Path, columns: Sequence[str], policy: BadRecordPolicy) -> Iterator[RawRecord]:
    """The records of one file, in order. `columns` limits what is read of a parquet file."""
    if path.name.endswith(".parquet"):
        return _read_parquet(path, columns, policy)
    return _read_text(path, policy)


def _open(path: Path) -> BinaryIO:
    try:
        if path.name.endswith(".gz"):
            return cast(BinaryIO, gzip.open(path, "rb"))
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror})") from error


def _read_text(path: Path, policy: BadRecordPolicy) -> Iterator[RawRecord]:
    with _open(path) as file:
        try:
            start = file.read(4096)
            if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise UserError(f"{path}: the file is UTF-16; convert it to UTF-8")
            file.seek(0)
            is_list = start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"[")
            if is_list or ".jsonl" not in path.name:
                yield from _JsonStream(path, file).records(policy)
            else:
                yield from _read_lines(path, file, policy)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            policy.report.read += 1
            policy.reject("torn file", path, f"the compressed file is torn or damaged ({error})")
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error})") from error


def _read_lines(path: Path, file: BinaryIO, policy: BadRecordPolicy) -> Iterator[RawRecord]:
    number = 0
    for line, raw in enumerate(file, start=1):
        if not raw.strip():
            continue
        number += 1
        try:
            yield RawRecord(Place(path, number, line), json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8")))
        except (ValueError, RecursionError) as error:
            policy.report.read += 1
            policy.reject("unreadable record", Place(path, number, line), f"not a JSON record ({_short(error)})")


def _short(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: {error.reason}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


class _Broken(Exception):
    """The text is no JSON list of records; `line` is where."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


class _JsonStream:
    """Values of one JSON list, or of JSON values one after another, decoded from a window that moves over the file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path = path
        self._file = file
        self._decode_bytes = codecs.getincrementaldecoder("utf-8-sig")()
        self._decode_json: Callable[[str, int], tuple[Any, int]] = json.JSONDecoder().raw_decode
        self._window = ""
        self._position = 0
        self._line = 1  # of self._position
        self._at_end = False

    def records(self, policy: BadRecordPolicy) -> Iterator[RawRecord]:
        number = 0
        try:
            in_list = self._peek() == "["
            if in_list:
                self._advance(self._position + 1)
            while (following := self._peek()) != "":
                if in_list and not number and following == "]":
                    break
                number += 1
                place = Place(self._path, number, self._line)
                value = self._value()
                yield RawRecord(place, value)
                if in_list and not self._another():
                    break
            else:
                if in_list:
                    raise _Broken("the file ends inside the list: it is torn", self._line)
                if not number:
                    raise _Broken("the file is empty", self._line)
            if in_list:
                self._advance(self._position + 1)
                if self._peek() != "":
                    raise _Broken("there is text behind the end of the list", self._line)
        except _Broken as error:
            policy.report.read += 1
            place = Place(self._path, max(number, 1), error.line)
            policy.reject("unreadable rest of a file", place, f"not JSON ({error})")

    def _another(self) -> bool:
        """After a value: True at a comma (which is passed), False at the end of the list."""
        following = self._peek()
        if following == ",":
            self._advance(self._position + 1)
            if self._peek() == "]":
                raise _Broken("the list ends with a comma", self._line)
            return True
        if following == "]":
            return False
        if following == "":
            raise _Broken("the file ends inside the list: it is torn", self._line)
        raise _Broken(f"',' or ']' expected, found {following!r}", self._line)

    def _value(self) -> Any:
        chunk = CHUNK
        while True:
            try:
                value, end = self._decode_json(self._window, self._position)
            except json.JSONDecodeError as error:
                if self._at_end or not self._may_be_unfinished(error):
                    raise _Broken(error.msg, self._line_of(error.pos)) from error
                if len(self._window) - self._position > LONGEST_RECORD:
                    raise _Broken("a record has no end", self._line) from error
            except (RecursionError, ValueError) as error:  # a number of thousands of digits is a ValueError
                raise _Broken(_short(error), self._line) from error
            else:
                # A number may go on behind the window, which then cuts it up to two characters late ("1e+").
                if end + 2 < len(self._window) or self._at_end:
                    self._advance(end)
                    return value
            self._refill(chunk)
            chunk *= 2

    def _may_be_unfinished(self, error: json.JSONDecodeError) -> bool:
        # The longest literal that a window can cut is "-Infinity"; an escape is shorter.
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._window) - 16

    def _peek(self) -> str:
        """The next character that is no white space, and moves there; "" at the end of the file."""
        while True:
            window, position = self._window, self._position
            while position < len(window) and window[position] in " \t\r\n":
                position += 1
            self._advance(position)
            if position < len(window):
                return window[position]
            if self._at_end:
                return ""
            self._refill(CHUNK)

    def _advance(self, position: int) -> None:
        self._line += self._window.count("\n", self._position, position)
        self._position = position

    def _line_of(self, position: int) -> int:
        return self._line + self._window.count("\n", self._position, position)

    def _refill(self, size: int) -> None:
        data = self._file.read(size)
        self._at_end = not data
        try:
            text = self._decode_bytes.decode(data, final=self._at_end)
        except UnicodeDecodeError as error:
            line = self._line_of(len(self._window)) + error.object[: error.start].count(b"\n")
            raise _Broken(f"not UTF-8: {error.reason}", line) from error
        self._window = self._window[self._position :] + text
        self._position = 0


def _read_parquet(path: Path, columns: Sequence[str], policy: BadRecordPolicy) -> Iterator[RawRecord]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            present = [name for name in file.schema_arrow.names if name in columns]
            if not present:
                names = ", ".join(file.schema_arrow.names)
                raise UserError(f"{path}: none of its columns ({names}) belongs to a known format")
            for batch in file.iter_batches(batch_size=1024, columns=present):
                for value in batch.to_pylist():
                    number += 1
                    yield RawRecord(Place(path, number, 0), value)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # the last two: no text, no date
        policy.report.read += 1
        policy.reject("torn file", Place(path, number + 1, 0), f"the parquet file is torn or damaged ({error})")
