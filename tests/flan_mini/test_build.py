import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from flacuna_jax.data.conversation import Conversation, Turn
from flacuna_jax.data.files import read_records
from flacuna_jax.data.formats import COLUMNS
from flacuna_jax.data.report import BadRecordPolicy, SourceReport
from flacuna_jax.data.tokenization import tokenize
from flacuna_jax.demo.corpus import TRAIN_FILE, CorpusSizes, build_corpus, write_corpus
from flacuna_jax.errors import UserError
from flacuna_jax.flan_mini import collection
from flacuna_jax.flan_mini.account import SourceAccount
from flacuna_jax.flan_mini.collection import Built, build, find_inputs
from flacuna_jax.flan_mini.config import FlanMiniConfig
from flacuna_jax.flan_mini.manifest import find_built, write_manifest
from tests.flan_mini import sources
from tests.flan_mini.sources import load_characters
from tests.hub_server import Hub
from tests.vocabularies import llama_template


def run(config: FlanMiniConfig, said: list[str] | None = None) -> Built:
    say = said.append if said is not None else lambda _: None
    inputs = find_inputs(config, "characters", say)
    built = build(config, inputs, load_characters, say)
    write_manifest(config, inputs, built)
    return built


def records(built: Built) -> list[dict[str, Any]]:
    return json.loads(built.path.read_text())


def account(built: Built, name: str) -> SourceAccount:
    return next(one for one in built.accounts if one.name == name)


@pytest.fixture
def everything(tmp_path: Path) -> tuple[dict[str, Any], ...]:
    """A source of nearly every kind."""
    root = tmp_path / "sources"
    for index, task in enumerate(("a:1.0.0", "b:1.0.0", "c:1.0.0")):
        for type_ in ("zs_opt", "fs_opt"):
            sources.jsonl(root / f"flan/{task[0]}_{type_}.jsonl", sources.flan_rows(40 * (index + 1), task, type_))
    for task in range(4):
        (root / "niv2").mkdir(exist_ok=True, parents=True)
        (root / f"niv2/task{task:03d}_n.json").write_text(json.dumps(sources.niv2_task(30, final=bool(task % 2))))
    sources.cot_tsv(root / "cot/gsm8k_train.tsv", 40)
    sources.cot_tsv(root / "cot/qed_train.tsv", 20)
    sources.jsonl(root / "csn/python/train/x.jsonl.gz", sources.code_search_rows(30))
    sources.parquet(root / "contests/train-0.parquet", sources.contest_rows(20))
    (root / "alpaca.json").write_text(json.dumps(sources.alpaca_rows(50)))
    chats = [sources.chat(f"c{i}", f"hello {i}", f"answer {i} " * 20, "more", f"again {i} " * 150) for i in range(20)]
    (root / "chats.json").write_text(json.dumps(chats))
    return (
        {"name": "flan", "kind": "flan_rows", "path": str(root / "flan"), "examples": 60},
        {"name": "niv2", "kind": "natural_instructions", "path": str(root / "niv2"), "examples": 40, "few_shot": 0.5},
        {"name": "cot", "kind": "chain_of_thought", "path": str(root / "cot"), "examples": 50, "few_shot": 0.5,
         "shares": {"direct": 1.0, "inverse": 0.3}},
        {"name": "code_search", "kind": "code_search_net", "path": str(root / "csn"), "examples": 20, "few_shot": 0.5},
        {"name": "code_contest", "kind": "code_contests", "path": str(root / "contests"), "examples": 20,
         "shares": {"direct": 3.0, "inverse": 1.0}},
        {"name": "alpaca_gpt4", "kind": "alpaca", "path": str(root / "alpaca.json"), "examples": 25},
        {"name": "sharegpt", "kind": "sharegpt", "path": str(root / "chats.json"), "examples": 25},
    )  # fmt: skip


CARD = b"---\nconfigs:\n- {config_name: all, data_files: all/tr*}\n- {config_name: ruby}\n---\n"


def test_datasets_of_the_hub_give_the_same_bytes_as_copies(
    tmp_path: Path, everything: tuple[dict[str, Any], ...], hub: Hub
) -> None:
    copies = {source["name"]: source for source in everything}
    functions = Path(copies["code_search"]["path"]) / "python/train/x.jsonl.gz"
    others = {"all/test.jsonl": b"held out", "ruby/train.jsonl": b"another configuration"}
    hub.add("lab/flan", Path(copies["flan"]["path"]), "dataset")
    hub.add("lab/functions", {"README.md": CARD, "all/train.jsonl.gz": functions.read_bytes(), **others}, "dataset")
    names = {"flan": "hf:lab/flan", "code_search": "hf:lab/functions:all"}
    expected = run(sources.config(tmp_path / "copies", *(copies[name] for name in names)))
    found = run(sources.config(tmp_path / "hub", *(copies[name] | {"path": path} for name, path in names.items())))
    assert found.sha256 == expected.sha256
    assert set(hub.downloaded()).isdisjoint(others)


def test_the_mixture_has_exactly_the_configured_numbers(tmp_path: Path, everything: tuple[dict[str, Any], ...]) -> None:
    built = run(sources.config(tmp_path / "out", *everything, max_length=1500))
    found = records(built)
    assert len(found) == built.records == len(built.statistics) == sum(source["examples"] for source in everything)
    assert {one.name: one.records for one in built.accounts} == {s["name"]: s["examples"] for s in everything}
    assert account(built, "cot").per_type == {"direct": 38, "inverse": 12}  # 50 as 1 : 0.3
    assert account(built, "code_contest").per_type == {"direct": 15, "inverse": 5}
    # Tasks in proportion to their size, 1 : 2 : 3.
    assert account(built, "flan").per_task == {"a:1.0.0": 10, "b:1.0.0": 20, "c:1.0.0": 30}
    for record in found:
        assert set(record) == {"id", "source", "conversations"}
        assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"] * (
            len(record["conversations"]) // 2
        )
    assert len({record["id"] for record in found}) == len(found)
    assert {record["source"] for record in found} >= {"a:1.0.0", "task001_n", "stream_qed", "cot_gsm8k_ii", "sharegpt"}


def test_lengths_equal_those_in_training(tmp_path: Path, everything: tuple[dict[str, Any], ...]) -> None:
    built = run(sources.config(tmp_path / "out", *everything, max_length=1500))
    measured = []
    for record in records(built):
        turns = tuple(
            Turn("user" if t["from"] == "human" else "assistant", t["value"]) for t in record["conversations"]
        )
        example = tokenize(Conversation("", "", turns), llama_template("vicuna_v1.1"), load_characters())
        measured.append((len(example.ids), int(example.loss_mask.sum())))
    assert max(length for length, _ in measured) <= 1500
    pairs = zip(built.statistics.length.tolist(), built.statistics.supervised.tolist(), strict=True)
    assert Counter(measured) == Counter(pairs)


def test_workers_and_file_order_do_not_change_the_bytes(
    tmp_path: Path, everything: tuple[dict[str, Any], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_length": 1500}
    one = run(sources.config(tmp_path / "one", *everything, **settings))
    monkeypatch.setattr(collection, "UNIT_FILES", 1)  # more jobs, so that two workers share them
    two = run(sources.config(tmp_path / "two", *everything, workers=2, **settings))
    assert one.path.read_bytes() == two.path.read_bytes()
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("one", "two")]
    assert manifests[0] == manifests[1]

    # The same rows in other files and another order.
    root = tmp_path / "sources"
    rows = [line for path in sorted((root / "flan").glob("*.jsonl")) for line in path.read_text().splitlines()]
    shutil.rmtree(root / "flan")
    (root / "flan").mkdir()
    (root / "flan/all.jsonl").write_text("\n".join(reversed(rows)))
    (root / "alpaca.json").write_text(json.dumps(sources.alpaca_rows(50)[::-1]))
    again = run(sources.config(tmp_path / "again", *everything, **settings))
    assert again.sha256 == one.sha256

    other = run(sources.config(tmp_path / "other", *everything, seed=43, **settings))
    assert other.sha256 != one.sha256


def test_few_shot_groups_have_exemplars_of_their_task_and_fit(
    tmp_path: Path, everything: tuple[dict[str, Any], ...]
) -> None:
    contests = everything[4] | {"few_shot": 1.0}
    built = run(sources.config(tmp_path / "out", contests, everything[3] | {"few_shot": 1.0}, max_length=900))
    found = records(built)
    groups = [record for record in found if record["source"] == "code_contest" and "Read n" in str(record)]
    prompts = [
        record["conversations"][0]["value"]
        for record in groups
        if record["conversations"][0]["value"].count("Read n") > 1
    ]
    assert len(prompts) > 10
    for record in found:
        prompt = record["conversations"][0]["value"]
        assert ("def add_" in str(record)) != ("Read n" in prompt + record["conversations"][1]["value"])
    assert built.statistics.length.max() <= 900


def test_every_item_is_accounted_for(tmp_path: Path) -> None:
    rows = (
        sources.flan_rows(10)
        + sources.flan_rows(3)
        + [{"inputs": " ", "targets": "x"}, {"inputs": "x" * 5000, "targets": "y"}]
    )
    rows += sources.flan_rows(4, task="drop:2.0.0")
    sources.jsonl(tmp_path / "rows.jsonl", rows)
    source = {
        "name": "flan",
        "kind": "flan_rows",
        "path": str(tmp_path / "rows.jsonl"),
        "examples": 100,
        "exclude": ("drop*",),
    }
    built = run(sources.config(tmp_path / "out", source, on_short="report"))
    one = built.accounts[0]
    assert one.read == 19
    assert one.unusable == {"empty text": 1}
    assert one.items == 18
    assert one.set_aside == {"same content": 3, "task not included": 4}
    assert one.lost == {"longer than max_length": 1}
    assert (one.distinct, one.used, one.failed, one.untried, one.records) == (11, 10, 1, 0, 10)


def test_a_source_with_too_few_records_is_an_error_with_the_reason(tmp_path: Path) -> None:
    sources.jsonl(tmp_path / "rows.jsonl", sources.flan_rows(10) + sources.flan_rows(2))
    source = {"name": "flan", "kind": "flan_rows", "path": str(tmp_path / "rows.jsonl"), "examples": 11}
    with pytest.raises(
        UserError, match=r"flan: 10 of 11 records; 12 records read, 10 distinct items; 2 × same content"
    ):
        run(sources.config(tmp_path / "out", source))
    assert not (tmp_path / "out/flan_mini.json").exists()


def test_records_that_do_not_fit_are_replaced_by_others(tmp_path: Path) -> None:
    rows = [{"inputs": f"{i} " * (1 if i % 2 else 3000), "targets": "t", "task_name": "x"} for i in range(200)]
    sources.jsonl(tmp_path / "rows.jsonl", rows)
    source = {"name": "flan", "kind": "flan_rows", "path": str(tmp_path / "rows.jsonl"), "examples": 100}
    built = run(sources.config(tmp_path / "out", source))
    assert built.records == 100
    assert account(built, "flan").failed <= 100


def test_scale_is_proportional(tmp_path: Path, everything: tuple[dict[str, Any], ...]) -> None:
    built = run(sources.config(tmp_path / "out", *everything, scale=0.1, max_length=1500))
    assert [one.records for one in built.accounts] == [6, 4, 5, 2, 2, 2, 2]


@pytest.mark.parametrize("format_", ["jsonl", "parquet"])
def test_other_formats_have_the_same_records(
    tmp_path: Path, everything: tuple[dict[str, Any], ...], format_: str
) -> None:
    expected = records(run(sources.config(tmp_path / "json", *everything[:2])))
    built = run(sources.config(tmp_path / "other", *everything[:2], format=format_))
    policy = BadRecordPolicy(SourceReport(""), "error")
    assert [raw.value for raw in read_records(built.path, COLUMNS, policy)] == expected


def test_a_finished_build_is_found_and_changes_are_reported(
    tmp_path: Path, everything: tuple[dict[str, Any], ...]
) -> None:
    def look(config: FlanMiniConfig) -> tuple[bool, str]:
        found = find_built(config, find_inputs(config, "characters", lambda _: None))
        return found.built is not None, found.why

    config = sources.config(tmp_path / "out", *everything[:2])
    assert look(config) == (False, "nothing has been built yet")
    built = run(config)
    assert look(config.model_copy(update={"workers": 2}))[0]
    again = find_built(config, find_inputs(config, "characters", lambda _: None)).built
    assert again is not None
    assert again.accounts == built.accounts
    assert look(config.model_copy(update={"seed": 7})) == (False, "changed since: settings.seed")
    path = tmp_path / "sources/flan/a_zs_opt.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[0].replace("number 0", "number x") + "\n")
    assert look(config) == (False, "changed since: inputs.flan.a_zs_opt.jsonl")
    path.unlink()
    assert "inputs.flan.a_zs_opt.jsonl" in look(config)[1]


def test_a_modified_collection_does_not_count_as_finished(
    tmp_path: Path, everything: tuple[dict[str, Any], ...]
) -> None:
    config = sources.config(tmp_path / "out", *everything[:1])
    built = run(config)
    data = bytearray(built.path.read_bytes())
    data[100] ^= 1
    built.path.write_bytes(data)
    found = find_built(config, find_inputs(config, "characters", lambda _: None))
    assert found.built is None
    assert "or was changed" in found.why


_KILLED = """
import os, signal, sys
from pathlib import Path
from flacuna_jax.flan_mini import stages, work
from flacuna_jax.flan_mini.collection import build, find_inputs
from flacuna_jax.config.files import load_config
from flacuna_jax.flan_mini.config import FlanMiniConfig
from tests.flan_mini.sources import load_characters
from tests.hub_server import Hub
config = load_config(sys.argv[1], schema=FlanMiniConfig)
save, left = work.save_result, [int(sys.argv[2])]
def save_and_die(path, result):
    save(path, result)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
work.save_result = save_and_die
build(config, find_inputs(config, "characters", print), load_characters, print)
"""


@pytest.mark.parametrize("after", [2, 7, 12])
def test_a_killed_build_continues_to_the_same_bytes(
    tmp_path: Path, everything: tuple[dict[str, Any], ...], after: int
) -> None:
    config = sources.config(tmp_path / "out", *everything, max_length=1500)
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path / "c.yaml"), str(after)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "out/flan_mini.json").exists()
    said: list[str] = []
    continued = run(config, said)
    assert any("by an interrupted build" in line for line in said)
    assert continued.sha256 == run(sources.config(tmp_path / "fresh", *everything, max_length=1500)).sha256
    assert not list((tmp_path / "out").glob(".work-*"))


def test_an_unfinished_build_with_other_settings_is_removed(
    tmp_path: Path, everything: tuple[dict[str, Any], ...]
) -> None:
    stale = tmp_path / "out/.work-0123"
    stale.mkdir(parents=True)
    said: list[str] = []
    run(sources.config(tmp_path / "out", *everything[:1]), said)
    assert not stale.exists()
    assert any(".work-0123" in line for line in said)


def test_bad_records_stop_the_build_with_their_place_or_are_counted(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(sources.flan_rows(1)[0]) + "\n{torn\n")
    source = {"name": "flan", "kind": "flan_rows", "path": str(tmp_path / "rows.jsonl"), "examples": 1}
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2.*\(on_bad_record: skip would count it"):
        run(sources.config(tmp_path / "a", source))
    built = run(sources.config(tmp_path / "b", source, on_bad_record="skip"))
    assert built.accounts[0].unusable == {"unreadable record": 1}
    assert "line 2" in built.accounts[0].first_seen["unreadable record"]


def test_an_unknown_family_is_named_with_the_nearest(tmp_path: Path) -> None:
    sources.jsonl(tmp_path / "r.jsonl", [{"a": "b"}])
    task = {"name": "t", "family": "nly", "files": "*.jsonl", "fields": {"premise": "a"}}
    source = {"name": "s", "kind": "task_rows", "path": str(tmp_path), "examples": 1, "tasks": (task,)}
    with pytest.raises(UserError, match="did you mean 'nli'"):
        find_inputs(sources.config(tmp_path / "o", source), "", print)
    task["family"] = "nli"
    with pytest.raises(UserError, match="family nli also needs fields for answer, hypothesis"):
        find_inputs(sources.config(tmp_path / "o", source), "", print)


def test_the_demos_corpus_goes_through_the_builder_unchanged(tmp_path: Path) -> None:
    corpus = build_corpus(7, CorpusSizes(conversations=40, instructions=12, held_out=4))
    write_corpus(corpus, tmp_path)
    source = {"name": "demo", "kind": "flan_mini", "path": str(tmp_path / TRAIN_FILE), "examples": len(corpus.train)}
    built = run(sources.config(tmp_path / "out", source))
    assert sorted(records(built), key=lambda r: r["id"]) == sorted(corpus.train, key=lambda r: r["id"])


def test_raw_rows_of_the_benchmarks_become_records(tmp_path: Path, test_data: Path) -> None:
    """The datasets of FLAN 2021, as distributed by their authors."""
    raw = test_data / "flan2021_raw_samples"
    for name in ("super_glue/rte/1.0.2", "piqa/plain_text/1.1.0", "ai2_arc/ARC-Easy/1.0.0"):
        with zipfile.ZipFile(raw / name / "dummy_data.zip") as archive:
            archive.extractall(tmp_path / "raw" / name)
    tasks = (
        {"name": "super_glue/rte:1.0.2", "family": "nli", "files": "super_glue/**/train.jsonl",
         "fields": {"premise": "premise", "hypothesis": "hypothesis", "answer": "label"},
         "labels": {"entailment": "yes", "not_entailment": "no"}},
        {"name": "ai2_arc/ARC-Easy:1.0.0", "family": "multiple_choice", "files": "ai2_arc/**/ARC-Easy-Train.jsonl",
         "fields": {"question": "question.stem", "options": "options", "answer": "answerKey"}},
    )  # fmt: skip
    for path in (tmp_path / "raw").glob("ai2_arc/**/ARC-Easy-Train.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        sources.jsonl(path, [row | {"options": [c["text"] for c in row["question"]["choices"]]} for row in rows])
    source = {"name": "flan2021", "kind": "task_rows", "path": str(tmp_path / "raw"), "examples": 100, "tasks": tasks}
    built = run(sources.config(tmp_path / "out", source | {"few_shot": 0.5}, on_short="report"))
    assert built.accounts[0].records == built.accounts[0].distinct > 3
    assert set(built.accounts[0].per_task) == {task["name"] for task in tasks}


@pytest.mark.parametrize("settings", [{"include": ("typo*",)}, {"exclude": ("*",)}, {"shares": {"fs_opt": 1.0}}])
def test_a_source_without_usable_items_lacks_all_records(tmp_path: Path, settings: dict[str, Any]) -> None:
    flan = str(sources.jsonl(tmp_path / "flan.jsonl", sources.flan_rows(20)))
    (tmp_path / "alpaca.json").write_text(json.dumps(sources.alpaca_rows(5)))
    both = (
        {"name": "flan", "kind": "flan_rows", "path": flan, "examples": 20, **settings},
        {"name": "alpaca", "kind": "alpaca", "path": str(tmp_path / "alpaca.json"), "examples": 5},
    )
    with pytest.raises(UserError, match="flan: 0 of 20 records"):
        run(sources.config(tmp_path / "a", *both))
    built = run(sources.config(tmp_path / "b", *both, on_short="report"))
    assert (built.records, account(built, "flan").records) == (5, 0)
