"""Common functions of the readers: finding files, extracting text from records."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flacuna_jax.data.files import DataFiles, Place, RawRecord, find_files, kind_of, read_records
from flacuna_jax.data.formats import BadRecord
from flacuna_jax.data.report import BadRecordPolicy
from flacuna_jax.data.splits import split_of
from flacuna_jax.errors import UserError
from flacuna_jax.flan_mini.config import MixtureSource
from flacuna_jax.flan_mini.items import Item, bad_unicode

Items = Iterator[tuple[Place, Item]]


class Unusable(Exception):
    """A valid record without anything to learn: it is counted under `reason` and is never an error."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Reader:
    """`find` lists a source's files; `read` yields the items of one of them.

    `read` counts every raw record in `policy.report.read` and every one it cannot use in the policy; a record may give
    several items (a programming problem gives one per solution).
    """

    find: Callable[[MixtureSource], DataFiles]
    read: Callable[[MixtureSource, Path, BadRecordPolicy], Items]


def find_all(source: MixtureSource) -> DataFiles:
    """Every data file of the source except CSV and TSV files, which only `task_rows` reads."""
    root = Path(source.path)
    found = find_files(root, f"sources.{source.name}")
    files = tuple(file for file in found.files if file == root or not _is_text_table(file))
    if not files:
        raise UserError(f"{root}: the directory has only CSV and TSV files (sources.{source.name})")
    tables = (str(file.relative_to(root)) for file in found.files if file not in set(files))
    return DataFiles(files, (*found.ignored, *tables))


def _is_text_table(path: Path) -> bool:
    kind = kind_of(path)
    return kind is not None and kind.format in ("csv", "tsv")


def find_training(source: MixtureSource) -> DataFiles:
    """The data files of the source without those of held-out splits by name ("x_valid_0.jsonl", "test/..."), which are
    listed as ignored."""
    root = Path(source.path)
    found = find_all(source)
    training = tuple(
        file for file in found.files if file == root or split_of(file.relative_to(root)) in (None, "train")
    )
    if not training:
        raise UserError(f"{root}: by their names, all of its data files are of held-out splits (valid, test, ...)")
    others = (str(file.relative_to(root)) for file in found.files if file not in set(training))
    return DataFiles(training, (*found.ignored, *others))


def raw_records(path: Path, columns: tuple[str, ...], policy: BadRecordPolicy) -> Iterator[RawRecord]:
    """The records of a file that are objects; every record is counted as read, and rejected if it is not an object."""
    for raw in read_records(path, columns, policy):
        policy.report.read += 1
        if isinstance(raw.value, dict):
            yield raw
        else:
            policy.reject("wrong type", raw.place, f"a record must be an object, not {type(raw.value).__name__}")


def each(
    path: Path,
    columns: tuple[str, ...],
    policy: BadRecordPolicy,
    convert: Callable[[Place, Mapping[str, Any]], Iterator[Item]],
) -> Items:
    """The items of every record by `convert`; BadRecord and Unusable go to the policy, with the record's place.

    After an error, no items of the record are used, including those before the error.
    """
    for place, record, _ in raw_records(path, columns, policy):
        for item in attempt(policy, place, lambda: list(convert(place, record))):  # noqa: B023, called at once
            yield place, item


def attempt(policy: BadRecordPolicy, where: object, make: Callable[[], list[Item]]) -> list[Item]:
    """The items of a record by `make`; if there are none that can be used, [], which is counted by reason."""
    try:
        items = make()
    except BadRecord as bad:
        policy.reject(bad.reason, where, bad.detail)
        return []
    except Unusable as unusable:
        policy.report.drop(unusable.reason, where, unusable.detail)
        return []
    if not items:
        policy.report.drop("nothing to use in the record", where)
    if any(bad_unicode(item.fields) or bad_unicode(item.task) for item in items):
        policy.reject("invalid Unicode", where, "the text contains half a surrogate pair")
        return []
    return items


def text_of(record: Mapping[str, Any], *names: str) -> str:
    """The text under the first of `names` that the record has; raises BadRecord if it has none of them, or if it is not
    text."""
    value = optional(record, *names)
    if value is None:
        has = ", ".join(list(record)[:10]) or "none"
        raise BadRecord("field missing", f"the record has no {' or '.join(names)} (its fields: {has})")
    return value


def optional(record: Mapping[str, Any], *names: str) -> str | None:
    """Like `text_of`, but None if the record has none of the fields."""
    for name in names:
        value = record.get(name)
        if isinstance(value, bytes):
            try:
                return value.decode()
            except UnicodeDecodeError as error:
                raise BadRecord("not UTF-8", f"{name!r} is not UTF-8: {error.reason}") from None
        if isinstance(value, str):
            return value
        if value is not None:
            raise BadRecord("wrong type", f"{name!r} must be text, not {type(value).__name__}")
    return None


def filled(text: str, what: str) -> str:
    """`text` without white space at its ends; raises Unusable if nothing is left."""
    text = text.strip()
    if not text:
        raise Unusable("empty text", f"the {what} is empty")
    return text
