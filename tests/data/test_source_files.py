"""The files of a source, and files of other programs: splits, `datasets`, LLaMA-Factory, spreadsheets."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from flacuna_jax.config.data import SourceConfig
from flacuna_jax.data.conversation import Conversation
from flacuna_jax.data.formats import read_source
from flacuna_jax.data.report import BadRecordPolicy, SourceReport
from flacuna_jax.data.source_files import source_files
from flacuna_jax.data.splits import split_of
from flacuna_jax.errors import UserError


def record(answer: str, **beside: Any) -> dict[str, Any]:
    return {"instruction": "q", "output": answer, **beside}


def write(path: Path, *records: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path: Path, mode: str = "error", **source: Any) -> tuple[list[Conversation], SourceReport]:
    report = SourceReport(str(path))
    found = read_source(SourceConfig(path=str(path), **source), BadRecordPolicy(report, mode))
    return [conversation for _, conversation in found], report


def answers(path: Path, **source: Any) -> list[str]:
    return [conversation.turns[-1].text for conversation in read(path, **source)[0]]


# --- Splits ------------------------------------------------------------------------------------------------------

LAYOUTS = {
    "files": ("train.jsonl", "validation.jsonl", "test.jsonl"),
    "shards of the Hub": (
        "data/train-00000-of-00001.jsonl",
        "data/validation-00000-of-00001.jsonl",
        "data/test-00000-of-00001.jsonl",
    ),
    "directories": ("train/a.jsonl", "validation/a.jsonl", "test/a.jsonl"),
    "words in names": ("my_train_file.jsonl", "my_valid_file.jsonl", "my_test_file.jsonl"),
}


@pytest.mark.parametrize("names", LAYOUTS.values(), ids=LAYOUTS)
def test_training_reads_the_train_split_and_reports_it(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name, answer in zip(names, ("train", "validation", "test"), strict=True):
        write(tmp_path / name, record(answer))
    assert answers(tmp_path) == ["train"]
    (note,) = read(tmp_path)[1].notes
    assert note.startswith("split train: 1 file read; left out as validation or test by name: ")
    assert all(str(Path(name)) in note for name in names[1:])
    assert answers(tmp_path, split="validation") == ["validation"]
    assert answers(tmp_path, split="test") == ["test"]
    with pytest.raises(UserError, match="no file has split: extra; available are "):
        read(tmp_path, split="extra")


def test_files_without_a_split_are_read_but_test_files_alone_are_not(tmp_path: Path) -> None:
    write(tmp_path / "alpaca.jsonl", record("a"))
    write(tmp_path / "code_train.jsonl", record("c"))
    assert answers(tmp_path) == ["a", "c"]
    write(tmp_path / "dev.jsonl", record("d"))
    assert answers(tmp_path) == ["a", "c"]
    write(tmp_path / "only" / "test.jsonl", record("t"))
    with pytest.raises(
        UserError, match=r"all of its data files are for validation or test \(test\); .* set split: test"
    ):
        read(tmp_path / "only")


def test_names_of_splits_on_the_hub(tmp_path: Path) -> None:
    for name in ("train_sft", "train_gen", "test_sft"):
        write(tmp_path / f"{name}-00000-of-00001.jsonl", record(name))
    assert answers(tmp_path) == ["train_gen", "train_sft"]
    assert answers(tmp_path, split="train_sft") == ["train_sft"]
    assert answers(tmp_path, split="test_sft") == ["test_sft"]
    conversations, _ = read(tmp_path, split="train_sft")
    assert conversations[0].source == "train_sft"


@pytest.mark.parametrize(
    ("name", "split"),
    {
        "train.json": "train",
        "training/x.json": "train",
        "x_valid_0.jsonl": "validation",
        "eval.json": "test",
        "dev/train.json": "train",
        "latest.json": None,
        "contest.json": None,
        "evaluate_this.json": None,
        "data.validation.json": None,
    }.items(),
)
def test_split_of_a_name(name: str, split: str | None) -> None:
    assert split_of(Path(name)) == split


def test_split_of_a_single_file(tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", record("a"))
    assert answers(path, split="train") == ["a"]
    with pytest.raises(UserError, match="split: test selects files of a directory, but this is a file"):
        read(path, split="test")


# --- Paths -------------------------------------------------------------------------------------------------------


def test_patterns(tmp_path: Path) -> None:
    for name in ("a1.jsonl", "a2.jsonl", "b.jsonl", "sub/a3.JSONL", "a4.md"):
        write(tmp_path / name, record(name))
    assert answers(tmp_path / "a*.jsonl") == ["a1.jsonl", "a2.jsonl"]
    assert answers(tmp_path / "**" / "a*") == ["a1.jsonl", "a2.jsonl", "sub/a3.JSONL"]
    assert read(tmp_path / "a*")[1].ignored_files == (str(tmp_path / "a4.md"),)
    with pytest.raises(UserError, match="the pattern matches no file"):
        read(tmp_path / "c*")
    write(tmp_path / "odd[1].jsonl", record("odd"))
    assert answers(tmp_path / "odd[1].jsonl") == ["odd"]


def test_a_directory_of_the_hub_cache_is_read_at_its_snapshot(tmp_path: Path) -> None:
    snapshot = tmp_path / "datasets--o--n" / "snapshots" / "abc"
    write(snapshot / "train.jsonl", record("a"))
    assert answers(tmp_path / "datasets--o--n") == ["a"]


# --- What other programs write -----------------------------------------------------------------------------------


def test_what_datasets_saves(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="files are written by datasets")
    rows = [record(str(number), messages=None, number=number) for number in range(50)]
    dataset = datasets.Dataset.from_list(rows)
    dataset.shuffle(seed=1).select(range(20)).save_to_disk(tmp_path / "one", num_shards=3)
    expected = list(datasets.load_from_disk(tmp_path / "one")["output"])
    conversations, report = read(tmp_path / "one")
    assert [conversation.turns[1].text for conversation in conversations] == expected
    assert report.ignored == {"number": 20}
    assert report.ignored_files == ()
    dataset.train_test_split(0.2, seed=0).save_to_disk(tmp_path / "two")
    loaded = datasets.load_from_disk(tmp_path / "two")
    assert answers(tmp_path / "two") == list(loaded["train"]["output"])
    assert answers(tmp_path / "two", split="test") == list(loaded["test"]["output"])
    # Saving again with fewer shards leaves the old ones; only those that state.json lists count.
    (tmp_path / "one" / "data-00099-of-00100.arrow").write_bytes(
        (tmp_path / "one").glob("*.arrow").__next__().read_bytes()
    )
    assert answers(tmp_path / "one") == expected


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_what_datasets_exports(tmp_path: Path, suffix: str) -> None:
    datasets = pytest.importorskip("datasets", reason="files are written by datasets")
    rows = [record(answer, input=text) for answer, text in (('a,\n"b"', ""), ("c", "é\t;"), (" d", "x"))]
    dataset = datasets.Dataset.from_list(rows)
    path = tmp_path / f"data.{suffix}"
    getattr(dataset, f"to_{suffix}")(path)
    conversations, report = read(path)
    assert [tuple(turn.text for turn in conversation.turns) for conversation in conversations] == [
        ("q", 'a,\n"b"'),
        ("q\né\t;", "c"),
        ("q\nx", " d"),
    ]
    assert not report.ignored


def test_nulls_in_columns_of_objects_are_removed(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="files are written by datasets")
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": "1"}}}
    other = {"type": "function", "function": {"name": "g", "arguments": {"b": "2"}}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": "q", "tool_calls": None},
                {"role": "assistant", "content": None, "tool_calls": [one]},
            ]
        }
        for one in (call, other)
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    conversations, _ = read(tmp_path / "a.parquet")
    assert [conversation.turns[1].extra for conversation in conversations] == [
        {"tool_calls": [call]},
        {"tool_calls": [other]},
    ]


def test_lists_in_csv_must_be_json(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="files are written by datasets")
    turns = [{"from": "human", "value": "it's"}, {"from": "gpt", "value": "a"}]
    datasets.Dataset.from_list([{"conversations": turns}]).to_csv(tmp_path / "a.csv")
    with pytest.raises(UserError, match=r"a\.csv, line 2 \(record 1\): .*a Python repr"):
        read(tmp_path / "a.csv")
    datasets.Dataset.from_list([{"conversations": json.dumps(turns)}]).to_csv(tmp_path / "a.csv")
    assert answers(tmp_path / "a.csv") == ["a"]


def test_spreadsheets(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbf" + b'question;answer;note\r\n"q;1";"a\r\nb";\r\n\r\nq2;a2;n\r\n')
    conversations, report = read(path)
    assert [tuple(turn.text for turn in one.turns) for one in conversations] == [("q;1", "a\r\nb"), ("q2", "a2")]
    assert conversations[1].id == "a.csv:2"
    assert report.ignored == {"note": 1}
    path.write_text("question,answer\nq,a,more\nq2,a2\n")
    with pytest.raises(UserError, match=r"line 2 \(record 1\): 3 cells in a table of 2 columns \(question, answer\)"):
        read(path)
    assert len(read(path, "skip")[0]) == 1
    path.write_text("question,question\nq,a\n")
    with pytest.raises(UserError, match="two columns are named 'question'"):
        read(path)
    path.write_text('question,answer\nq,"a\nq2,a2\n')
    with pytest.raises(
        UserError, match=r"line 2 \(record 1\): not a table \(unexpected end of data; cells with quotes"
    ):
        read(path)
    path.write_text("What is it?,That.\nq,a\n")
    with pytest.raises(
        UserError, match=r"the first line must name the columns, and no name in it \(What is it\?, That\.\)"
    ):
        read(path)
    path.write_bytes("question,answer\nq,é\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"not UTF-8.*; save it as UTF-8"):
        read(path)
    path.write_bytes("question,answer\nq,a\n".encode("utf-16"))
    with pytest.raises(UserError, match="UTF-16; convert it to UTF-8"):
        read(path)
    path.write_text("Question, Answer\nq,a\n")
    with pytest.raises(
        UserError, match=r"no name in it \(Question,  Answer\).*; write the names in lower case: question, answer"
    ):
        read(path)


def test_field_names_in_another_case(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"Instruction": "q", "output": "a"})
    with pytest.raises(UserError, match="field names must be lower case: write 'Instruction' as 'instruction'"):
        read(path)


WRAPPED = {
    "data": {"data": [record("1"), record("2")]},
    "after other members": {"version": "1", "meta": {"a": [1]}, "train": [record("1"), record("2")]},
    "before other members": {"rows": [record("1"), record("2")], "license": "x", "more": {"a": 1}},
}


@pytest.mark.parametrize("tree", WRAPPED.values(), ids=WRAPPED)
def test_a_list_inside_an_object(tmp_path: Path, tree: dict[str, Any]) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(tree, indent=1))
    conversations, report = read(path)
    assert [conversation.turns[1].text for conversation in conversations] == ["1", "2"]
    beside = [name for name, value in tree.items() if not (isinstance(value, list) and len(value) == 2)]
    assert report.ignored == {f"{name} (of the file)": 1 for name in beside}
    path.write_text(json.dumps(tree, indent=1)[:-2])
    with pytest.raises(UserError, match=r"a\.json, line \d+ \(record \d\): not JSON"):
        read(path)


def test_llama_factorys_descriptions(tmp_path: Path) -> None:
    write(tmp_path / "own.json", {"q": "q1", "x": "x1", "a": "a1", "h": [["q0", "a0"]], "s": "S", "input": "unused"})
    turns = [{"who": "U", "what": "q"}, {"who": "F", "what": '{"name": "f", "arguments": {}}'}]
    turns += [{"who": "O", "what": "r"}, {"who": "A", "what": "a"}]
    write(tmp_path / "dialogs.json", {"dialog": turns, "functions_": '[{"name": "f"}]'})
    write(tmp_path / "plain.json", record("a"))
    tags = {"role_tag": "who", "content_tag": "what", "user_tag": "U", "assistant_tag": "A"}
    tags |= {"observation_tag": "O", "function_tag": "F"}
    description = {
        "mine": {
            "file_name": "own.json",
            "columns": {"prompt": "q", "query": "x", "response": "a", "history": "h", "system": "s"},
        },
        "talk": {
            "file_name": "dialogs.json",
            "formatting": "sharegpt",
            "columns": {"messages": "dialog", "tools": "functions_"},
            "tags": tags,
        },
        "far": {"hf_hub_url": "o/n"},
        "pairs": {"file_name": "pairs.json", "ranking": True},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(description))
    conversations, report = read(tmp_path)
    talk, mine, plain = conversations
    assert [(turn.role, turn.text) for turn in mine.turns] == [
        ("user", "q0"),
        ("assistant", "a0"),
        ("user", "q1\nx1"),
        ("assistant", "a1"),
    ]
    assert mine.system == "S"
    assert [turn.role for turn in talk.turns] == ["user", "assistant", "tool", "assistant"]
    assert talk.turns[1].extra == {"tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    assert talk.tools == ({"type": "function", "function": {"name": "f"}},)
    assert plain.turns[1].text == "a"
    assert report.ignored == {"input": 1}
    assert report.notes == (
        "dialogs.json read as 'talk' of dataset_info.json",
        "own.json read as 'mine' of dataset_info.json",
    )
    assert answers(tmp_path / "own.json") == ["a1"]  # a single file is described, too
    write(tmp_path / "pairs.json", record("a"))
    with pytest.raises(UserError, match="'chosen' must be text or messages, and is missing"):
        read(tmp_path / "pairs.json")
    with pytest.raises(UserError, match="describes data files and has no records; give its directory"):
        read(tmp_path / "dataset_info.json")
    for damage, message in {
        "[": "cannot be read as JSON",
        '{"x": {"file_name": "own.json", "formatting": "csv"}}': "'x': formatting is 'csv'; it must be alpaca",
        '{"x": {"file_name": "own.json", "columns": {"prmpt": "q"}}}': "columns has the unknown name 'prmpt'",
    }.items():
        (tmp_path / "dataset_info.json").write_text(damage)
        with pytest.raises(UserError, match=message):
            read(tmp_path / "own.json")


# --- Damage and mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet", "csv", "arrow"])
def test_a_git_lfs_pointer_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123456\n")
    with pytest.raises(UserError, match=r"this is a Git LFS pointer, not the file of 123,456 bytes .*git lfs pull"):
        read(path)


def test_files_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(gzip.compress(json.dumps(record("a")).encode()))
    with pytest.raises(UserError, match=r"compressed with gzip, unlike its name; .* ends in \.gz"):
        read(path)
    path.write_text("\n<!DOCTYPE html><html>")
    with pytest.raises(UserError, match="a web page"):
        read(path)
    path.write_text(json.dumps(record("a"), indent=1))
    with pytest.raises(
        UserError, match=r"line 1 .*records span several lines: give the file a name that ends in \.json"
    ):
        read(path)
    path.write_text("{'instruction': 'q', 'output': 'a'}\n")
    with pytest.raises(UserError, match="the repr of a Python dict"):
        read(path)


def test_a_duplicate_key(tmp_path: Path) -> None:
    good, bad = json.dumps(record("a")), '{"instruction": "q", "output": "a", "output": "b"}'
    lines, listed = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_text(f"{good}\n{bad}\n{good}\n")
    listed.write_text(f"[{good},\n{bad},\n{good}]")
    for path in (lines, listed):
        with pytest.raises(UserError, match=r"line 2 \(record 2\): the key 'output' appears twice in an object"):
            read(path)
        conversations, report = read(path, "skip")
        assert (len(conversations), report.dropped) == (2, {"key given twice": 1})


def test_two_formats_in_one_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", record("a"), {"question": "q", "answer": "a"})
    with pytest.raises(
        UserError,
        match=r"line 2 .*its fields are those of format question_answer, but line 1 \(record 1\) set the format "
        r"of the file to alpaca; put the two formats into separate files",
    ):
        read(path)


def test_ignored_fields_are_reported_by_name(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="files are written by datasets")
    rows = [record("a", category="x", score=number or None, empty=None) for number in range(3)]
    write(tmp_path / "a.jsonl", *rows)
    _, report = read(tmp_path / "a.jsonl")
    assert report.ignored == {"category": 3, "score": 2}
    assert report.lines()[1:] == ["  field category ignored in 3 records", "  field score ignored in 2 records"]
    datasets.Dataset.from_list([record("a", category="x", topic="y", empty=None)] * 3).to_parquet(
        tmp_path / "a.parquet"
    )
    _, report = read(tmp_path / "a.parquet")
    assert report.lines()[1:] == ["  fields category, topic ignored in 3 records"]


def test_file_names_are_relative_to_the_root_of_the_source(tmp_path: Path) -> None:
    write(tmp_path / "d" / "x" / "a.jsonl", record("a"))
    for path in (tmp_path / "d" / "x" / "a.jsonl", tmp_path / "d", tmp_path / "d" / "*" / "a.jsonl"):
        found = source_files(str(path))
        assert [str(file.relative_to(found.root)) for file in found.files] in (["a.jsonl"], ["x/a.jsonl"])
