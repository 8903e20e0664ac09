import csv
import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flacuna_jax.errors import UserError
from flacuna_jax.flan_mini.leakage import LeakageScan, held_in, read_items

WORDS = [f"w{i}" for i in range(40)]


def scan(tmp_path: Path, items: list[str], ngram: int = 3) -> LeakageScan:
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps({"question": item}) + "\n" for item in items))
    return LeakageScan({"bench": str(path)}, ngram)


def test_coverage_is_the_fraction_of_an_items_ngrams_in_the_records(tmp_path: Path) -> None:
    found = scan(tmp_path, ["a b c d e", "p q r s", "x y"])
    found.add("task1", ["Now: A, b; c! d"], ["q r"])
    found.add("task2", ["nothing"], ["p q r"])
    (result,) = found.finish()
    assert (result.items, result.too_short) == (3, 1)
    assert result.prompt.tolist() == [pytest.approx(2 / 3), 0]
    assert result.answer.tolist() == [0, pytest.approx(1 / 2)]
    assert result.anywhere.tolist() == [pytest.approx(2 / 3), pytest.approx(1 / 2)]
    assert (result.touched(), result.covered(0.6)) == (2, 1)
    assert result.tasks == (("task1", 1), ("task2", 1))
    assert result.worst[0][1] == "a b c d e"


def test_ngrams_do_not_extend_over_the_end_of_a_text(tmp_path: Path) -> None:
    found = scan(tmp_path, ["a b c"])
    found.add("t", ["a b", "c"], ["a", "b c"])
    found.add("t", ["b c a"], [])
    assert found.finish()[0].touched() == 0


@given(
    st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=12), min_size=1, max_size=6),
    st.lists(st.lists(st.sampled_from(WORDS), max_size=30), max_size=6),
)
def test_equals_the_definition(
    tmp_path_factory: pytest.TempPathFactory, items: list[list[str]], texts: list[list[str]]
) -> None:
    def grams(words: list[str]) -> set[tuple[str, ...]]:
        return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}

    found = scan(tmp_path_factory.mktemp("l"), [" ".join(words) for words in items])
    for text in texts:
        found.add("t", [" ".join(text)], [])
    (result,) = found.finish()
    seen = set().union(*map(grams, texts))
    expected = [len(grams(words) & seen) / len(grams(words)) for words in items if grams(words)]
    assert result.prompt.tolist() == pytest.approx(expected)
    assert result.too_short == len(items) - len(expected)


def test_held_in_benchmarks_are_found_by_name(test_data: Path) -> None:
    names = json.loads((test_data / "flan_mini_facts/train_eval_key_list.json").read_text())
    found = held_in(names["train_key_list"] + names["eval_key_list"])
    assert set(found["DROP"]) >= {"drop:2.0.0", "task026_drop_question_generation"}
    # The released collection has DROP's tasks, and none of MMLU, BIG-bench, CRASS, HumanEval or HHH.
    assert not set(found) & {"MMLU", "BBH", "CRASS", "HumanEval", "HHH"}


def test_items_of_every_kind_of_file(tmp_path: Path, test_data: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps([{"a": "one", "b": ["two"], "id": "no"}, {"a": "three"}]))
    (tmp_path / "bbh.json").write_text(json.dumps({"canary": "x", "examples": [{"input": "one"}, {"input": "two"}]}))
    (tmp_path / "drop.json").write_text(json.dumps({"p1": {"passage": "one"}, "p2": {"passage": "two"}}))
    (tmp_path / "hhh.json").write_text(json.dumps({"examples": [{"input": "q", "target_scores": {"yes": 1, "no": 0}}]}))
    with (tmp_path / "mmlu.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["a question,\nof two lines", "x", "y"], ["another", "x", "y"]])
    (tmp_path / "t.txt").write_text("one\ntwo\n\nthree\n")
    with gzip.open(tmp_path / "h.jsonl.gz", "wt") as gz:
        gz.write('{"prompt": "def f():", "task_id": "no"}\n')
    found = {path.name: list(read_items(path)) for path in tmp_path.iterdir()}
    assert found["list.json"] == ["one two", "three"]
    assert found["bbh.json"] == found["drop.json"] == ["one", "two"]
    assert found["hhh.json"] == ["q yes no"]
    assert len(found["mmlu.csv"]) == 2
    assert found["t.txt"] == ["one\ntwo", "three\n"]
    assert found["h.jsonl.gz"] == ["def f():"]
    assert len(list(read_items(test_data / "humaneval"))) == 164
    assert len(list(read_items(test_data / "mmlu"))) > 1000


def test_wrong_paths_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError, match=r"leakage\.files"):
            list(read_items(path))
    (tmp_path / "x.bin").write_text("x")
    with pytest.raises(UserError, match="cannot be read from this kind of file"):
        list(read_items(tmp_path / "x.bin"))
