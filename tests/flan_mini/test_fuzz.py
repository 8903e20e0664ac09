"""Torn, huge, deeply nested, wrongly encoded and malicious records: no crash, and every record is counted."""

import contextlib
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flacuna_jax.data.report import SourceReport
from flacuna_jax.errors import UserError
from flacuna_jax.flan_mini.config import MixtureSource
from flacuna_jax.flan_mini.readers import READERS
from flacuna_jax.flan_mini.stages import _items, scan
from tests.flan_mini import sources

FIELDS = {
    "flan_rows": ("inputs", "targets", "task_name", "template_type", "inputs_pretokenized"),
    "natural_instructions": ("Definition", "Instances", "Positive Examples", "input", "output"),
    "code_search_net": ("code", "docstring", "language", "partition", "func_name"),
    "apps": ("question", "solutions", "starter_code"),
    "code_contests": ("description", "solutions", "language", "solution"),
    "alpaca": ("instruction", "input", "output"),
    "sharegpt": ("id", "conversations", "from", "value", "log"),
    "flan_mini": ("id", "source", "conversations", "from", "value"),
}
WORDS = [
    "human",
    "gpt",
    "python",
    "train",
    "zs_opt",
    "",
    " ",
    "</s>",
    "{input}",
    "\ud800",
    "\x00",
    "[]",
    "[1]",
    '["a"]',
    "ß",
]

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=True)
    | st.sampled_from(WORDS)
    | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from([f for fields in FIELDS.values() for f in fields]), inner, max_size=5)
    ),
    max_leaves=12,
)


def source(kind: str, path: Path) -> MixtureSource:
    return MixtureSource(name="s", kind=kind, path=str(path), examples=1)


def account(kind: str, path: Path) -> tuple[int, SourceReport]:
    """The records with an item, and the report."""
    report = SourceReport(str(path))
    one = source(kind, path)
    config = sources.config(path.parent, one, on_bad_record="skip")
    for item in _items(config, one, READERS[kind].find(one).files, report):
        json.dumps([item.task, item.fields], ensure_ascii=False).encode()  # can be written
        assert item.task
    gave = report.read - sum(report.dropped.values())
    assert gave >= 0
    return gave, report


@pytest.mark.parametrize("kind", sorted(FIELDS))
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(data=st.data())
def test_any_json_is_read_or_counted(kind: str, tmp_path: Path, data: st.DataObject) -> None:
    fields = st.dictionaries(st.sampled_from(FIELDS[kind]), json_values, max_size=5)
    # A first row that is a list would make it a file of one JSON list.
    rows = [{}, *data.draw(st.lists(fields | json_values, max_size=6))]
    path = tmp_path / "fuzz.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, report = account(kind, path)
    if kind not in ("natural_instructions", "sharegpt"):  # there a row may contain several records
        assert report.read == len(rows)


@pytest.mark.parametrize("kind", sorted(FIELDS))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.binary(max_size=200), name=st.sampled_from(["x.json", "x.jsonl", "x.jsonl.gz", "x.parquet"]))
def test_any_bytes_are_read_or_counted_or_an_error(kind: str, tmp_path: Path, junk: bytes, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(junk)[: max(4, len(junk))] if name.endswith("gz") else junk)
    with contextlib.suppress(UserError):  # a whole file that cannot be read at all: UTF-16, no known column
        account(kind, path)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"")), max_size=6))
def test_any_tsv_is_read_or_counted(tmp_path: Path, lines: list[bytes]) -> None:
    path = tmp_path / "x_train.tsv"
    path.write_bytes(b"\n".join(lines))
    _, report = account("chain_of_thought", path)
    assert report.read == sum(bool(line.strip()) for line in lines)


def test_deeply_nested_huge_and_torn_records_are_counted(tmp_path: Path) -> None:
    good = json.dumps(sources.flan_rows(1)[0])
    deep = "[" * 100_000 + "]" * 100_000
    huge = json.dumps({"inputs": "x" * 5_000_000, "targets": "y", "task_name": "t"})
    (tmp_path / "a.jsonl").write_text("\n".join([good, deep, huge, good[:-5], good]))
    items, report = account("flan_rows", tmp_path / "a.jsonl")
    assert (items, report.read) == (3, 5)
    assert report.dropped == {"unreadable record": 2}
    (tmp_path / "b.json").write_text(f"[{good}, {good}, {good[:-9]}")
    items, report = account("flan_rows", tmp_path / "b.json")
    assert items == 2
    assert sum(report.dropped.values()) == 1


def test_lone_surrogates_and_odd_task_names_do_not_reach_the_output(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"inputs": "bad \ud800", "targets": "x", "task_name": "t"},
        {"inputs": "ok", "targets": "x", "task_name": "t\udfff"},
        {"inputs": "line\u2028separator\x00", "targets": "y", "task_name": "../../etc"},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items, report = account("flan_rows", path)
    assert (items, report.dropped) == (1, {"invalid Unicode": 2})
    one = source("flan_rows", path)
    chats = [sources.chat("x\ud800", "q", "a"), sources.chat("y", "q", "a")]
    (tmp_path / "b.json").write_text(json.dumps([chat | {"source": "s"} for chat in chats]))
    assert account("sharegpt", tmp_path / "b.json")[0] == 1
    assert account("flan_mini", tmp_path / "b.json")[0] == 2  # an id that cannot be written is replaced
    result = scan(sources.config(tmp_path, one, on_bad_record="skip"), one, [path])
    assert result.facts["strata"] == [["../../etc", ""]]
