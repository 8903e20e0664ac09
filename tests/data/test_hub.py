import json
import sys
from pathlib import Path
from typing import Any

import pytest

from flacuna_jax.config.schema import DataConfig, SourceConfig
from flacuna_jax.data.build import build_store
from flacuna_jax.data.files import read_records
from flacuna_jax.data.hub import HubName, local_path, local_sources
from flacuna_jax.data.report import BadRecordPolicy, SourceReport
from flacuna_jax.errors import UserError
from tests.data.conftest import Characters


def test_names() -> None:
    assert HubName.parse("hf:codeparrot/apps") == HubName("codeparrot/apps", None, "train")
    assert HubName.parse("hf:a/b:c:validation") == HubName("a/b", "c", "validation")
    assert HubName.parse("hf:a/b::test").file == "a--b-test.parquet"


def test_local_paths_are_left_alone(tmp_path: Path) -> None:
    assert local_path("data/apps", tmp_path, "sources.apps") == "data/apps"


def test_a_hub_dataset_is_downloaded_once_and_read_as_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the hub extra")
    calls = []

    def load(*arguments: Any, **options: Any) -> Any:
        calls.append((arguments, options))
        return datasets.Dataset.from_list([{"instruction": f"Double {i}.", "output": str(2 * i)} for i in range(3)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    (tmp_path / "own.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    sources = (SourceConfig(path="hf:tatsu-lab/alpaca"), SourceConfig(path=str(tmp_path / "own.jsonl")))
    for _ in range(2):
        config = local_sources(DataConfig(sources=sources), tmp_path / "downloads")
        _, report = build_store(config, Characters())
        assert [source.kept for source in report.sources] == [3, 1]
    assert calls == [(("tatsu-lab/alpaca", None), {"split": "train"})]


def test_an_unreachable_hub_is_an_error_that_names_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the hub extra")

    def load(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    config = DataConfig(sources=(SourceConfig(path="hf:a/b"),))
    with pytest.raises(UserError, match=r"data\.sources\.0: hf:a/b could not be downloaded .*no network"):
        local_sources(config, tmp_path)
    assert not list(tmp_path.rglob("*.parquet"))


def test_the_message_names_the_extra_of_a_missing_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"flacuna-jax\[hub\]"):
        local_path("hf:a/b", tmp_path, "data.sources.0")


@pytest.mark.parametrize("path", ["hf:", "hf::main"])
def test_an_invalid_hub_name(tmp_path: Path, path: str) -> None:
    with pytest.raises(UserError, match="is not a dataset name"):
        local_path(path, tmp_path, "data.sources.0")


def test_the_split_of_a_source_selects_the_split_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the hub extra")

    def load(name: str, config: str | None, split: str) -> Any:
        return datasets.Dataset.from_list([{"instruction": f"{name} {config}", "output": split}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    for path, split in (("hf:a/b", "test"), ("hf:a/b:c", "test"), ("hf:a/b:c:test", "test")):
        (source,) = local_sources(DataConfig(sources=(SourceConfig(path=path, split=split),)), tmp_path).sources
        assert [found.value["output"] for found in read_records(Path(source.path), ("output",), POLICY)] == ["test"]
    config = local_sources(DataConfig(sources=(SourceConfig(path="hf:a/b.c", split="train_sft"),)), tmp_path)
    assert build_store(config, Characters())[1].kept == 1
    with pytest.raises(UserError, match="the path has split train, but split: test is another"):
        local_sources(DataConfig(sources=(SourceConfig(path="hf:a/b:c:train", split="test"),)), tmp_path)


POLICY = BadRecordPolicy(SourceReport(""), "error")
