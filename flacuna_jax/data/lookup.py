"""Finds the original record of an example in its file."""

from collections.abc import Collection
from typing import Any

from flacuna_jax.data.files import read_records
from flacuna_jax.data.formats import COLUMNS
from flacuna_jax.data.report import BadRecordPolicy, SourceReport
from flacuna_jax.data.source_files import source_files


def find_records(path: str, numbers: Collection[int], split: str | None = None) -> dict[int, dict[str, Any]]:
    """The place and content of records of a source, by their number from 0 (`TokenStore.record_index`).

    `path` and `split` are those of the source, whose files are read again up to the last requested record.
    Raises UserError if they can no longer be read.
    """
    report = SourceReport(path)
    policy = BadRecordPolicy(report, "skip")
    found: dict[int, dict[str, Any]] = {}
    left = set(numbers)
    for file in source_files(path, split).files:
        for raw in read_records(file, COLUMNS, policy):
            if not left:
                return found
            if report.read in left:
                left.discard(report.read)
                found[report.read] = {"place": str(raw.place), "record": raw.value}
            report.read += 1
    return found
