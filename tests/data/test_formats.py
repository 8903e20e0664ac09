"""Reading: every format and file kind, what is repaired and counted, and what is rejected with its place."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flacuna_jax.config.data import SourceConfig
from flacuna_jax.data import files, json_records
from flacuna_jax.data.conversation import Conversation, Turn
from flacuna_jax.data.files import find_files, kind_of, read_records
from flacuna_jax.data.formats import LEADING_ANSWER, NO_ANSWER, UNANSWERED, read_source
from flacuna_jax.data.report import BadRecordPolicy, SourceReport
from flacuna_jax.errors import UserError


def chat(*texts: str, start: int = 0) -> dict[str, Any]:
    return {"conversations": [{"from": ("human", "gpt")[(i + start) % 2], "value": t} for i, t in enumerate(texts)]}


def read(path: Path, mode: str = "error", kind: str = "auto") -> tuple[list[Conversation], SourceReport]:
    report = SourceReport(str(path))
    source = SourceConfig(path=str(path), format=kind)
    found = [conversation for _, conversation in read_source(source, BadRecordPolicy(report, mode))]
    assert report.read == len(found) + report.dropped.total()
    return found, report


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def said(conversation: Conversation) -> list[str]:
    return [turn.text for turn in conversation.turns]


RECORDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "sharegpt": (chat("hi", "hello", "x", "y"), ["hi", "hello", "x", "y"]),
    "messages": (
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
        ["hi", "hello"],
    ),
    "alpaca": ({"instruction": "Add. ", "input": " 1 2", "output": "3"}, ["Add.\n1 2", "3"]),
    "prompt_completion": ({"prompt": "a ", "completion": " b"}, ["a ", " b"]),
}


@pytest.mark.parametrize("detect", [True, False])
@pytest.mark.parametrize("kind", RECORDS)
def test_formats(tmp_path: Path, kind: str, detect: bool) -> None:
    record, texts = RECORDS[kind]
    (first, second), _ = read(
        write(tmp_path / "a.jsonl", record, {**record, "id": 7, "source": "cot_gsm8k"}), kind="auto" if detect else kind
    )
    assert said(first) == texts
    assert [turn.role for turn in first.turns] == ["user", "assistant"] * (len(texts) // 2)
    assert (first.id, first.source) == ("a.jsonl:1", "a")
    assert (second.id, second.source) == ("7", "cot_gsm8k")


@pytest.mark.parametrize("empty", [{}, {"input": ""}, {"input": None}, {"input": "<noinput>"}, {"input": " \n"}])
def test_alpaca_without_input(tmp_path: Path, empty: dict[str, Any]) -> None:
    (conversation,), _ = read(write(tmp_path / "a.jsonl", {"instruction": "Sing.", "output": "La", **empty}))
    assert said(conversation) == ["Sing.", "La"]


def test_system_messages(tmp_path: Path) -> None:
    def record(*roles: str) -> dict[str, Any]:
        return {"messages": [{"role": role, "content": role} for role in roles]}

    (own,), _ = read(write(tmp_path / "a.jsonl", record("system", "user", "assistant")))
    assert own.system == "system"
    (plain,), _ = read(write(tmp_path / "a.jsonl", record("user", "assistant")))
    assert plain.system is None
    (later,), _ = read(write(tmp_path / "a.jsonl", record("user", "assistant", "system", "user", "assistant")))
    assert later.system is None
    assert [turn.role for turn in later.turns] == ["user", "assistant", "system", "user", "assistant"]


def test_content_in_parts(tmp_path: Path) -> None:
    def record(*parts: object) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "x"}]}

    texts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (conversation,), _ = read(write(tmp_path / "a.jsonl", record(*texts)))
    assert said(conversation) == ["ab", "x"]
    with pytest.raises(UserError, match="'content' of turn 1 must be text"):
        read(write(tmp_path / "a.jsonl", record(*texts, {"type": "image_url"})))


def test_repairs_are_counted(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl",
        chat("Hello, I am", "q", "a", start=1),
        chat("q", "a", "and then?"),
        chat("q", "a", "and then?", ""),
        chat("q", "", "and then?", "b"),
        chat("only a question"),
        chat("no question", start=1),
        chat("q", ""),
        chat("q", " \n"),
        chat(),
    )
    conversations, report = read(path)
    assert [said(c) for c in conversations] == [["q", "a"], ["q", "a"], ["q", "a"], ["q", "", "and then?", "b"]]
    assert report.changed == {LEADING_ANSWER: 1, UNANSWERED: 2}
    assert report.dropped == {NO_ANSWER: 5}
    assert report.first_seen[NO_ANSWER] == f"{path}, line 5 (record 5)"


BAD: dict[str, tuple[object, str, str]] = {
    "unknown role": (
        {"conversations": [{"from": "narrator", "value": "x"}]},
        "unknown role",
        "unknown from 'narrator'",
    ),
    "role of no type": ({"conversations": [{"from": ["human"], "value": "x"}]}, "unknown role", r"\['human'\]"),
    "number as text": ({"conversations": [{"from": "human", "value": 3}]}, "wrong type", "'value' of turn 1"),
    "turn as text": ({"conversations": ["hi"]}, "wrong type", "turn 1 must be an object, not text"),
    "turns as text": ({"conversations": "hi"}, "wrong type", "'conversations' is the text 'hi', which is not JSON"),
    "number": (3, "wrong type", "must be an object, not a number"),
    "null": (None, "wrong type", "must be an object, not null"),
    "half a surrogate": (chat("q", "\ud800"), "invalid Unicode", "surrogate"),
}


@pytest.mark.parametrize(("record", "reason", "message"), BAD.values(), ids=BAD)
def test_bad_records(tmp_path: Path, record: object, reason: str, message: str) -> None:
    path = write(tmp_path / "a.jsonl", chat("q", "a"), record, chat("q", "b"))
    with pytest.raises(UserError, match=message) as error:
        read(path)
    assert str(error.value).startswith(f"{path}, line 2 (record 2): ")
    conversations, report = read(path, "skip")
    assert [said(c) for c in conversations] == [["q", "a"], ["q", "b"]]
    assert report.dropped == {reason: 1}


def test_records_without_a_known_format(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "x", "label": 1}, chat("q", "a"))
    with pytest.raises(UserError, match=r"line 1 .*only `text`; set format: text .*\(its fields: text, label\)"):
        read(path)
    conversations, report = read(path, "skip")
    assert (len(conversations), report.dropped) == (1, {"no known format": 1})


def test_a_named_format_applies_to_all_records(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'instruction' must be text, and is missing"):
        read(write(tmp_path / "a.jsonl", chat("q", "a")), kind="alpaca")


def save(path: Path, records: list[dict[str, Any]]) -> Path:
    table = pyarrow.Table.from_pylist(records)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=2)
    elif path.suffix == ".arrow":
        with pyarrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    else:
        kind = kind_of(path)
        assert kind is not None
        path.write_bytes(COMPRESS[kind.compression](as_text(kind.format, records).encode()))
    return path


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda content: pyarrow.compress(content, codec="zstd", asbytes=True),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def as_text(kind: str, records: list[dict[str, Any]]) -> str:
    """Records as the text of a file; lists in the cells of a table are JSON."""
    if kind == "json":
        return json.dumps(records, indent=2)
    if kind == "lines":
        return "\n".join(map(json.dumps, records))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), delimiter="," if kind == "csv" else "\t")
    writer.writeheader()
    writer.writerows(
        {key: value if isinstance(value, str) else json.dumps(value) for key, value in record.items()}
        for record in records
    )
    return text.getvalue()


NAMES = [*files.SUFFIXES, ".JSONL", ".json.gz", ".jsonl.gz", ".jsonl.zst", ".csv.zst", ".jsonl.bz2", ".ndjson.xz"]


@pytest.mark.parametrize("suffix", NAMES)
@pytest.mark.parametrize("kind", RECORDS)
def test_files(tmp_path: Path, suffix: str, kind: str) -> None:
    records = [{**RECORDS[kind][0], "id": f"r{i}"} for i in range(5)]
    conversations, _ = read(save(tmp_path / f"data{suffix}", records))
    assert [(c.id, said(c)) for c in conversations] == [(f"r{i}", RECORDS[kind][1]) for i in range(5)]


def test_directories(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".cache").mkdir()
    for name, answer in (("b.jsonl", "2"), ("a.json", "1"), ("sub/c.parquet", "3"), (".cache/x.json", "no")):
        save(tmp_path / name, [chat("q", answer)])
    (tmp_path / "README.md").write_text("about")
    conversations, report = read(tmp_path)
    assert [said(c)[1] for c in conversations] == ["1", "2", "3"]
    assert report.ignored_files == ("README.md",)
    assert "1 other file in the directory ignored: README.md" in report.lines()[-1]


def test_missing_and_unsupported_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or directory"):
        find_files(tmp_path / "nothing")
    with pytest.raises(UserError, match="has no file that ends in"):
        find_files(tmp_path)
    (tmp_path / "data.xlsx").write_text("a,b")
    with pytest.raises(UserError, match="does not end in one of"):
        find_files(tmp_path / "data.xlsx")
    with pytest.raises(UserError, match=r"has no file that ends in .*; it contains data\.xlsx"):
        find_files(tmp_path)
    (tmp_path / "data.txt").write_text("text")
    with pytest.raises(UserError, match="format: text"):
        find_files(tmp_path / "data.txt")


def torn(path: Path) -> Path:
    save(path, [chat("q", f"a{i}") for i in range(20)])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    return path


@pytest.mark.parametrize("suffix", NAMES)
def test_torn_files(tmp_path: Path, suffix: str) -> None:
    path = torn(tmp_path / f"data{suffix}")
    with pytest.raises(UserError, match=r"torn|not JSON|not a JSON record") as error:
        read(path)
    assert str(path) in str(error.value)
    conversations, report = read(path, "skip")
    assert [said(c) for c in conversations] == [["q", f"a{i}"] for i in range(len(conversations))]
    assert report.dropped.total() == 1


def test_bad_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = json.dumps(chat("q", "a")).encode()
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join([good, b"", b'{"a": ', b"\xff\xfe", b"[" * 9999, good, b""]))
    with pytest.raises(UserError, match=r"line 3 \(record 2\): not a JSON record \(Expecting value"):
        read(path)
    conversations, report = read(path, "skip")
    assert (len(conversations), report.dropped) == (2, {"unreadable record": 3})


BROKEN_LISTS = {
    '[{"a": 1},\n{"a": }, {"a": 3}]': (2, "Expecting value"),
    '[{"a": 1}\n{"a": 2}]': (2, "',' or '\\]' expected, found '{'"),
    '[{"a": 1},\n]': (2, "ends with a comma"),
    '[{"a": 1}]\nmore': (2, "after the end of the list"),
    '[{"a": 1},\n': (2, "torn"),
    '[{"a": 1}': (1, "torn"),
    '[{"a": 1}, {"b": "\\x"}]': (1, "escape"),
    '[{"a": 1},\n {"b": "\n"}]': (2, "control character"),
    "": (1, "empty"),
    " \n ": (2, "empty"),
    '{"a": {"b": 1}': (1, "delimiter"),
    "[" * 100_000: (1, "nested too deeply"),
    '[{"a": ' + "9" * 5000 + "}]": (1, "4300 digits"),
}


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("text", BROKEN_LISTS, ids=lambda text: repr(text[:30]))
def test_broken_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, chunk: int) -> None:
    monkeypatch.setattr(json_records, "CHUNK", chunk if len(text) < 1000 else 1 << 20)
    line, message = BROKEN_LISTS[text]
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=rf"a\.json, line {line} \(record \d\): not JSON \(.*{message}"):
        list(read_records(tmp_path / "a.json", (), BadRecordPolicy(SourceReport("a"), "error")))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_wrong_encodings(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(json.dumps([chat("q", "a")]).encode("utf-16"))
    with pytest.raises(UserError, match="UTF-16; convert it to UTF-8"):
        read(tmp_path / name)
    (tmp_path / name).write_bytes(json.dumps([chat("q", "é")], ensure_ascii=False, indent=0).encode("latin-1"))
    with pytest.raises(UserError, match=r"line \d+ .*not UTF-8"):
        read(tmp_path / name)


def test_a_list_may_be_named_jsonl_and_lines_json(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps([chat("q", "1"), chat("q", "2")]))
    (tmp_path / "b.json").write_text("\n".join(json.dumps(chat("q", answer), indent=1) for answer in "34"))
    conversations, _ = read(tmp_path)
    assert [said(c)[1] for c in conversations] == ["1", "2", "3", "4"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(json_values, max_size=5), st.integers(1, 40), st.sampled_from([None, 0, 3]), st.booleans())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_list_at_any_chunk_size(
    tmp_path: Path, values: list[Any], chunk: int, indent: int | None, ascii_only: bool
) -> None:
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    policy = BadRecordPolicy(SourceReport("a"), "error")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_records, "CHUNK", chunk)
        records = list(read_records(path, (), policy))
        assert [record.value for record in records] == values
        assert [record.place.number for record in records] == list(range(1, len(values) + 1))
        if indent is not None:
            lines = text.split("\n")
            assert all(lines[r.place.line - 1].lstrip().startswith(json.dumps(r.value)[:1]) for r in records)
        # A list cut at any byte is an error, and the records read before the cut are a prefix of it.
        cut = len(text.encode()) * chunk // 41
        path.write_bytes(text.encode()[:cut])
        skipped = BadRecordPolicy(SourceReport("a"), "skip")
        beginning = [record.value for record in read_records(path, (), skipped)]
        assert beginning[:-1] == values[: len(beginning) - 1] if beginning else True
        assert skipped.report.dropped.total() == 1


def test_large_lists_take_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The window never grows beyond two chunks while records are small."""
    monkeypatch.setattr(json_records, "CHUNK", 1 << 12)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([chat("q" * 50, "a" * 50)] * 2000))
    largest = 0
    refill = json_records._JsonStream._refill

    def watch(stream: json_records._JsonStream, size: int) -> None:
        nonlocal largest
        refill(stream, size)
        largest = max(largest, len(stream._window))

    monkeypatch.setattr(json_records._JsonStream, "_refill", watch)
    assert len(read(path)[0]) == 2000
    assert largest <= 3 << 12


def test_parquet_reads_only_what_it_needs(tmp_path: Path) -> None:
    path = save(tmp_path / "a.parquet", [{"text": "x"}])
    with pytest.raises(UserError, match=r"only `text`; set format: text"):
        read(path)
    path = save(tmp_path / "b.parquet", [{"label_name": "x"}])
    with pytest.raises(UserError, match=r"none of its columns \(label_name\)"):
        read(path)
    records = [{**chat("q", f"a{i}"), "embedding": [0.0] * 4} for i in range(3)]
    raw = read_records(save(path, records), ("conversations",), BadRecordPolicy(SourceReport("a"), "error"))
    assert [(set(r.value), str(r.place)) for r in raw] == [({"conversations"}, f"{path}, row {i}") for i in (1, 2, 3)]


@pytest.mark.parametrize("column", [pyarrow.array([b"\xff"] * 3), pyarrow.array([2**61] * 3, pyarrow.timestamp("us"))])
def test_parquet_values_that_python_cannot_hold(tmp_path: Path, column: pyarrow.Array) -> None:
    if pyarrow.types.is_binary(column.type):  # bytes that are declared as text
        column = pyarrow.StringArray.from_buffers(3, column.buffers()[1], column.buffers()[2])
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"instruction": ["q"] * 3, "output": ["a"] * 3, "id": column}), path)
    with pytest.raises(UserError, match=r"row 1: the parquet file is torn or damaged \("):
        read(path)
    assert read(path, "skip")[1].dropped.total() == 1


def test_real_files(test_data: Path) -> None:
    conversations, report = read(test_data / "stanford_alpaca" / "alpaca_5000.json")
    assert (report.read, len(conversations), report.dropped) == (5000, 4998, {NO_ANSWER: 2})
    conversations, _ = read(test_data / "sharegpt" / "dummy_conversation.json")
    assert len(conversations) == 500
    assert conversations[0].turns[1] == Turn("assistant", said(conversations[0])[1])
    with pytest.raises(UserError, match="no known format"):
        read(test_data / "sharegpt" / "dialogstudio_converted_example.json")
