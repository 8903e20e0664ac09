"""From a data file to the tokens with loss, and the output of `prepare` and `train`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from flacuna_jax.cli import run_verb
from flacuna_jax.config.data import DataConfig, SourceConfig
from flacuna_jax.data.build import REFUSED, TURNS_REMOVED, build_store
from flacuna_jax.data.report import DataReport
from flacuna_jax.data.store import TokenStore
from flacuna_jax.distributed import unread_launcher
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.tokenizer import load_tokenizer
from flacuna_jax.prepare import main as prepare

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOLS = {
    "messages": [
        {"role": "user", "content": "hot?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "sunny"},
        {"role": "assistant", "content": "yes", "weight": 0},
        {"role": "user", "content": "now?"},
        {"role": "assistant", "content": "no"},
    ]
}


@pytest.fixture
def tokenizer(llama_tokenizer: Path) -> Any:
    return load_tokenizer(llama_tokenizer)


def build(
    directory: Path, tokenizer: Any, *records: object, kind: str = "auto", **settings: Any
) -> tuple[TokenStore, DataReport]:
    path = directory / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = SourceConfig(path=str(path), format=kind)
    return build_store(DataConfig(sources=(source,), template="vicuna_v1.1", **settings), tokenizer)


def with_loss(store: TokenStore, tokenizer: Any, index: int = 0) -> list[str]:
    """The texts of the spans with loss."""
    example = store.example(index)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], example.loss_mask, [0]])))
    return [tokenizer.decode(example.ids[start:end].tolist()) for start, end in edges.reshape(-1, 2)]


def test_turns_without_loss_and_calls_as_text(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl, line 1 \(record 1\): vicuna_v1\.1 .*data\.tools_as_text: true"):
        build(tmp_path, tokenizer, TOOLS)
    _, report = build(tmp_path, tokenizer, TOOLS, {"messages": TOOLS["messages"][-2:]}, on_bad_record="skip")
    assert report.sources[0].dropped == {REFUSED: 1}
    store, _ = build(tmp_path, tokenizer, TOOLS, tools_as_text=True)
    call, last = with_loss(store, tokenizer)
    assert json.dumps(CALL["function"]) in call
    assert last.removesuffix("</s>").strip() == "no"


def test_a_prompt_of_messages_carries_no_loss(tmp_path: Path, tokenizer: Any) -> None:
    prompt = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "3"},
    ]
    store, _ = build(tmp_path, tokenizer, {"prompt": prompt, "completion": "four"})
    (only,) = with_loss(store, tokenizer)
    assert only.removesuffix("</s>").strip() == "four"


def test_plain_text(tmp_path: Path, tokenizer: Any) -> None:
    store, _ = build(tmp_path, tokenizer, {"text": "Once upon a time."}, kind="text")
    example = store.example(0)
    assert example.ids.tolist() == [1, *tokenizer.encode("Once upon a time."), 2]
    assert example.loss_mask.tolist() == [False] + [True] * (len(example.ids) - 1)


def test_exchanges_with_tools_are_removed_as_a_whole(tmp_path: Path, tokenizer: Any) -> None:
    long = [dict(message) for message in TOOLS["messages"]]
    long[2]["content"] = "sunny " * 40
    long[5]["content"] = "no " * 60
    for train_on, kept in (("assistant", "weather"), ("last", "no no")):
        store, report = build(
            tmp_path,
            tokenizer,
            {"messages": long},
            over_length="truncate_prompt",
            train_on=train_on,
            tools_as_text=True,
            max_length=180,
        )
        assert report.sources[0].changed == {TURNS_REMOVED: 1}
        assert kept in "".join(with_loss(store, tokenizer))


def test_unknown_tokens_with_loss_are_counted(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    record = {"instruction": "Which way?", "output": "left or right"}
    unknown = tokenizer.encode("left")[0]
    monkeypatch.setattr(tokenizer, "unk_id", unknown, raising=False)
    _, report = build(tmp_path, tokenizer, record, record)
    (source,) = report.sources
    assert source.unknown_tokens == 2
    (line,) = [line for line in source.lines() if "unknown token" in line]
    assert line.startswith("  warning: 2 tokens with loss (")
    monkeypatch.setattr(tokenizer, "unk_id", None)
    assert build(tmp_path, tokenizer, record)[1].sources[0].unknown_tokens == 0


def test_the_output_of_prepare(
    tmp_path: Path, llama_tokenizer: Path, story_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "test"):
        (data / f"{name}.jsonl").write_text(json.dumps({"instruction": "q", "output": "a", "topic": "x"}) + "\n")
    tree = {
        "output_dir": str(tmp_path / "run"),
        "model": {"path": str(story_llama), "tokenizer": str(llama_tokenizer)},
        "data": {"sources": [{"path": str(data)}], "max_length": 4096},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    command = ["--config", str(tmp_path / "c.yaml"), "--cache", str(tmp_path / "cache")]
    assert run_verb(prepare, [*command, "--output", str(tmp_path / "report")]) == 0
    said = capsys.readouterr().out
    assert "split train: 1 file read; left out as validation or test by name: test.jsonl" in said
    assert "field topic ignored in 1 record\n" in said
    assert "warning: data.max_length 4096 exceeds the model's context of 512" in said
    assert "field ignored" in (tmp_path / "report" / "report.md").read_text()
    assert run_verb(prepare, [*command, "--data.sources.0.split=test"]) == 0
    assert "split test: 1 of 2 files read" in capsys.readouterr().out
    assert run_verb(prepare, command) == 0
    said = capsys.readouterr().out
    assert "tokenised data: hit" in said
    assert "field topic ignored in 1 record\n" in said
    assert "split train" in said


def test_variables_of_torchrun_are_reported() -> None:
    assert unread_launcher({}) is None
    assert unread_launcher({"WORLD_SIZE": "1", "RANK": "0"}) is None
    said = unread_launcher({"WORLD_SIZE": "8", "RANK": "3"})
    assert said is not None
    assert said.startswith("WORLD_SIZE=8 and RANK=3 are set, as by torchrun or accelerate, but are not used")
