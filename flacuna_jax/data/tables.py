"""Records of tables: CSV and TSV with a header line, Parquet, and Arrow (the format of `datasets` on disk)."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from flacuna_jax.data.raw import FileKind, Place, RawRecord, is_damage, open_data_file, require_no_utf16
from flacuna_jax.data.report import BadRecordPolicy
from flacuna_jax.errors import UserError

LONGEST_FIELD = 256 << 20
"""Maximum length of a quoted field in characters."""
_ROWS = 1024


def read_csv(path: Path, kind: FileKind, columns: Sequence[str], policy: BadRecordPolicy) -> Iterator[RawRecord]:
    """The rows of a CSV or TSV file as objects of text, whose keys are the names in the first line.

    Raises UserError if that line has none of `columns`, unless `columns` is empty. The separator of a .csv file is
    comma, semicolon or tab, whichever occurs most in that line.
    """
    csv.field_size_limit(LONGEST_FIELD)
    number, line = 0, 1
    with open_data_file(path, kind) as file:
        try:
            start = file.peek(4096)
            require_no_utf16(path, start)
            header = start.partition(b"\n")[0].decode(errors="replace")
            separator = "\t" if kind.format == "tsv" else max(",;\t", key=header.count)
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
            rows = csv.reader(text, delimiter=separator, strict=True)
            names = next(rows, [])
            _require_header(path, names, columns)
            line = rows.line_num + 1
            for row in rows:
                if row:
                    number += 1
                    place = Place(path, number, line)
                    if len(row) > len(names):
                        policy.report.read += 1
                        detail = f"{len(row)} cells in a table of {len(names)} columns ({', '.join(names)})"
                        policy.reject("too many cells", place, detail)
                    else:
                        yield RawRecord(place, dict(zip(names, row, strict=False)))
                line = rows.line_num + 1
        except (csv.Error, UnicodeDecodeError) as error:
            policy.report.read += 1
            what = (
                f"not UTF-8: {error.reason}; save it as UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
            )
            if isinstance(error, csv.Error):
                what += "; cells with quotes or line breaks must be quoted, as csv writers do"
            policy.reject("unreadable rest of a file", Place(path, number + 1, line), f"not a table ({what})")
        except Exception as error:
            if not is_damage(error):
                raise
            policy.report.read += 1
            policy.reject("torn file", path, f"the compressed file is torn or damaged ({error})")


def _require_header(path: Path, names: Sequence[str], columns: Sequence[str]) -> None:
    if not names:
        raise UserError(f"{path}: the file is empty; the first line of a table must name its columns")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path}: two columns are named {twice[0]!r}; the first line must name each column once")
    if columns and not set(names) & set(columns):
        shown = ", ".join(name[:30] for name in names[:8])
        known = [name for name in map(_plain, names) if name in columns]
        advice = f"; write the names in lower case: {', '.join(known)}" if known else ""
        raise UserError(
            f"{path}: the first line must name the columns, and no name in it ({shown}) belongs to a known format"
            f"{advice}"
        )


def _plain(name: str) -> str:
    return name.strip().lower()


def read_parquet(path: Path, columns: Sequence[str], policy: BadRecordPolicy) -> Iterator[RawRecord]:
    """The rows of a Parquet file, with only `columns`; `RawRecord.unread` lists the others."""
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            present, unread = _columns(path, file.schema_arrow.names, columns)
            unread = tuple(name for name in unread if not _is_empty(file, name))
            for batch in file.iter_batches(batch_size=_ROWS, columns=present):
                for value in batch.to_pylist():
                    number += 1
                    yield RawRecord(Place(path, number, 0), _without_nulls(value), unread)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # the last two: invalid text or dates
        policy.report.read += 1
        policy.reject("torn file", Place(path, number + 1, 0), f"the parquet file is torn or damaged ({error})")


def read_arrow(path: Path, columns: Sequence[str], policy: BadRecordPolicy) -> Iterator[RawRecord]:
    """The rows of an Arrow file, in either of the layouts of save_to_disk of `datasets`; see read_parquet."""
    number = 0
    try:
        with pyarrow.memory_map(str(path)) as source:
            for batch in _batches(source):
                present, unread = _columns(path, batch.schema.names, columns)
                unread = tuple(name for name in unread if batch.column(name).null_count < len(batch))
                for start in range(0, len(batch), _ROWS):
                    for value in batch.select(present).slice(start, _ROWS).to_pylist():
                        number += 1
                        yield RawRecord(Place(path, number, 0), _without_nulls(value), unread)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        policy.report.read += 1
        policy.reject("torn file", Place(path, number + 1, 0), f"the Arrow file is torn or damaged ({error})")


def _batches(source: Any) -> Iterator[Any]:
    try:
        yield from pyarrow.ipc.open_stream(source)
    except pyarrow.ArrowInvalid:
        source.seek(0)
        reader = pyarrow.ipc.open_file(source)
        yield from (reader.get_batch(index) for index in range(reader.num_record_batches))


def _columns(path: Path, names: Sequence[str], wanted: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    present = [name for name in names if name in wanted]
    if not present:
        raise UserError(f"{path}: none of its columns ({', '.join(names)}) belongs to a known format")
    return present, tuple(name for name in names if name not in present)


def _is_empty(file: pyarrow.parquet.ParquetFile, column: str) -> bool:
    """Whether a column contains only nulls, according to the statistics in the file."""
    if pyarrow.types.is_null(file.schema_arrow.field(column).type):
        return True
    metadata = file.metadata
    for group in range(metadata.num_row_groups):
        facts = metadata.row_group(group)
        of_column = [facts.column(i) for i in range(facts.num_columns) if facts.column(i).path_in_schema == column]
        if len(of_column) != 1 or of_column[0].statistics is None:
            return False
        if of_column[0].statistics.null_count != facts.num_rows:
            return False
    return True


def _without_nulls(value: Any) -> Any:
    """Removes keys with null, because a column of objects has every key in every row, with null if it is not set."""
    if isinstance(value, dict):
        return {key: _without_nulls(part) for key, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
