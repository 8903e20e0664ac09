"""Raw records of data files with their places, streamed in bounded memory.

Every fault of a file is a UserError that names the file and the line (or row). Damage that begins at a record goes to
the BadRecordPolicy, which may count it instead. `source_files.py` finds the files of a source.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from flacuna_jax.data.json_records import read_json
from flacuna_jax.data.raw import KNOWN_SUFFIXES, SUFFIXES, Place, RawRecord, kind_of
from flacuna_jax.data.report import BadRecordPolicy
from flacuna_jax.data.source_files import DataFiles, find_files
from flacuna_jax.data.tables import read_arrow, read_csv, read_parquet
from flacuna_jax.errors import UserError
from flacuna_jax.git_lfs import require_content

__all__ = ["SUFFIXES", "DataFiles", "Place", "RawRecord", "find_files", "kind_of", "read_records"]


def read_records(path: Path, columns: Sequence[str], policy: BadRecordPolicy) -> Iterator[RawRecord]:
    """The records of one file, in order. `columns` are the columns to read from a table."""
    kind = kind_of(path)
    if kind is None:
        raise UserError(f"{path}: the name does not end in one of {KNOWN_SUFFIXES}")
    if kind.format in ("parquet", "arrow"):
        require_content(path)
        return read_parquet(path, columns, policy) if kind.format == "parquet" else read_arrow(path, columns, policy)
    return read_csv(path, kind, columns, policy) if kind.format in ("csv", "tsv") else read_json(path, kind, policy)
