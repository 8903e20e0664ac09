"""Merges the records of all sources into one file as a stream, in an order that depends on (seed, content)."""

import heapq
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from numpy.typing import NDArray

from flacuna_jax.flan_mini.config import FlanMiniConfig
from flacuna_jax.flan_mini.identity import file_hash
from flacuna_jax.whole_files import replacing

ROW_GROUP = 8192
_SCHEMA = pyarrow.schema(
    [
        ("id", pyarrow.string()),
        ("source", pyarrow.string()),
        ("conversations", pyarrow.list_(pyarrow.struct([("from", pyarrow.string()), ("value", pyarrow.string())]))),
    ]
)


@dataclass(frozen=True)
class Part:
    """A sorted file of records (`stages.write`); for each of `keys` (sorted), the first `used` parts are used."""

    path: Path
    keys: NDArray[np.uint64]
    used: NDArray[np.int32]


@dataclass(frozen=True)
class Merged:
    records: int
    sha256: str
    path: Path


def merge(config: FlanMiniConfig, parts: Sequence[Part]) -> Merged:
    """Writes `flan_mini.{json,jsonl,parquet}` atomically."""
    path = config.directory / f"flan_mini.{config.format}"
    write = {"json": _write_list, "jsonl": _write_lines, "parquet": _write_parquet}[config.format]
    with replacing(path) as partial:
        with ExitStack() as stack:
            streams = [stack.enter_context(part.path.open(encoding="utf-8", newline="\n")) for part in parts]
            lines = heapq.merge(*(_taken(part, stream) for part, stream in zip(parts, streams, strict=True)))
            records = write(partial, (line.split(" ", 1)[1].rstrip("\n") for line in lines))
        digest = file_hash(partial)
    return Merged(records, digest, path)


def _taken(part: Part, lines: Iterable[str]) -> Iterator[str]:
    """The lines whose record is used; a line begins with order, key (16 hex digits each) and part (4)."""
    for line in lines:
        key, number = int(line[16:32], 16), int(line[32:36], 16)
        place = int(np.searchsorted(part.keys, np.uint64(key)))
        if place < len(part.keys) and part.keys[place] == key and number < part.used[place]:
            yield line


def _write_list(path: Path, records: Iterator[str]) -> int:
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write("[\n")
        for record in records:
            file.write(f",\n{record}" if count else record)
            count += 1
        file.write("\n]\n" if count else "]\n")
        file.flush()
        os.fsync(file.fileno())
    return count


def _write_lines(path: Path, records: Iterator[str]) -> int:
    count = 0
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for record in records:
            file.write(f"{record}\n")
            count += 1
        file.flush()
        os.fsync(file.fileno())
    return count


def _write_parquet(path: Path, records: Iterator[str]) -> int:
    count = 0
    with pyarrow.parquet.ParquetWriter(path, _SCHEMA, compression="zstd") as writer:
        group: list[object] = []
        for record in records:
            group.append(json.loads(record))
            count += 1
            if len(group) == ROW_GROUP:
                writer.write_table(pyarrow.Table.from_pylist(group, _SCHEMA))
                group = []
        if group:
            writer.write_table(pyarrow.Table.from_pylist(group, _SCHEMA))
    return count
