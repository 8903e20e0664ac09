"""Raw records and their places; kinds of data files by name; opening of data files."""

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, cast

import pyarrow

from flacuna_jax.errors import UserError
from flacuna_jax.git_lfs import require_content

Format = Literal["json", "lines", "csv", "tsv", "parquet", "arrow"]

_FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        ".json": "json",
        ".jsonl": "lines",
        ".ndjson": "lines",
        ".jsonlines": "lines",
        ".csv": "csv",
        ".tsv": "tsv",
        ".parquet": "parquet",
        ".arrow": "arrow",
    }
)
SUFFIXES = tuple(_FORMATS)
_OPENERS: Mapping[str, Callable[[Path], Any]] = MappingProxyType(
    {
        ".gz": gzip.open,
        ".zst": lambda path: io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), 1 << 20),
        ".bz2": bz2.open,
        ".xz": lzma.open,
    }
)
KNOWN_SUFFIXES = f"{', '.join(SUFFIXES)} (the text formats also with {', '.join(_OPENERS)} appended)"

_MAGIC = (
    (b"\x1f\x8b", "compressed with gzip", ".gz"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd", ".zst"),
    (b"BZh", "compressed with bzip2", ".bz2"),
    (b"\xfd7zXZ\x00", "compressed with xz", ".xz"),
    (b"PAR1", "a Parquet file", ".parquet"),
    (b"ARROW1", "an Arrow file", ".arrow"),
    (b"PK\x03\x04", "a zip archive; unpack it", ""),
    (b"\x89HDF", "an HDF5 file; convert it to Parquet", ""),
    (b"SQLite format 3", "an SQLite database; export its table to CSV", ""),
)
_WEB_PAGE = (b"<!doctype html", b"<html")


class Place(NamedTuple):
    """The place of a record: `number` counts records or rows from 1; `line` is 0 in files without lines (Parquet)."""

    path: Path
    number: int
    line: int

    def __str__(self) -> str:
        return f"{self.path}, {self.in_file}"

    @property
    def in_file(self) -> str:
        return f"line {self.line} (record {self.number})" if self.line else f"row {self.number}"


class RawRecord(NamedTuple):
    """An unchanged record of a file. `unread` lists the columns of a Parquet file that were not read."""

    place: Place
    value: Any
    unread: tuple[str, ...] = ()


DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that describe data files and contain no records."""


class FileKind(NamedTuple):
    format: Format
    compression: str
    """The suffix of the compression; empty if the file is not compressed."""


def kind_of(path: Path) -> FileKind | None:
    """The kind of a data file by its name, in upper or lower case; None if the name is not that of a data file."""
    name = path.name.lower()
    compression = next((suffix for suffix in _OPENERS if name.endswith(suffix)), "")
    suffix = Path(name.removesuffix(compression)).suffix
    found = _FORMATS.get(suffix)
    if found is None or (compression and found in ("parquet", "arrow")):
        return None
    return FileKind(found, compression)


def is_data_file(path: Path) -> bool:
    """Whether a file contains records, by its name."""
    return kind_of(path) is not None and path.name not in DESCRIPTIONS


DAMAGED = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
"""Exceptions of the decompressors for a torn or damaged file; that of zstd raises an OSError without errno."""


def is_damage(error: Exception) -> bool:
    return isinstance(error, DAMAGED) or (isinstance(error, OSError) and error.errno is None)


def require_no_utf16(path: Path, start: bytes) -> None:
    """Raises UserError for UTF-16, which Excel calls Unicode text. `start` are the first bytes of the file."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{path}: the file is UTF-16; convert it to UTF-8")


def open_data_file(path: Path, kind: FileKind) -> io.BufferedReader:
    """A reader of the decompressed bytes of a file. It supports peek, but may not support seek.

    Raises UserError if the file cannot be opened or its first bytes show another kind.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
        _require_kind(path, kind, start)
        return cast(io.BufferedReader, _OPENERS[kind.compression](path) if kind.compression else path.open("rb"))
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror or error})") from error


def _require_kind(path: Path, kind: FileKind, start: bytes) -> None:
    require_content(path)
    for magic, what, suffix in _MAGIC:
        if start.startswith(magic) and suffix not in (kind.compression, f".{kind.format}"):
            rename = f"; rename it so that it ends in {suffix}" if suffix else ""
            raise UserError(f"{path}: the file is {what}, unlike its name{rename}")
    if start.lstrip().lower().startswith(_WEB_PAGE):
        raise UserError(f"{path}: the file is a web page (HTML), not data; check the address it was downloaded from")
