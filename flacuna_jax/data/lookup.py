"""Back from an example to the record it was made of, as it stands in its file."""

from collections.abc import Collection
from typing import Any

from flacuna_jax.data.files import read_records
from flacuna_jax.data.formats import COLUMNS
from flacuna_jax.data.report import BadRecordPolicy, SourceReport
from flacuna_jax.data.source_files import source_files


def find_records(path: str, numbers: Collection[int], split: str | None = None) -> dict[int, dict[str, Any]]:
    """The records of a source by their number from 0 (`TokenStore.record_index`): where each is, and what it says.

    `path` and `split` are those of the source, whose files are read again up to the last one wanted.
    Raises UserError where they cannot be read any more.
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
