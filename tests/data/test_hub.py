"""Datasets of the Hugging Face Hub, by the real client and a local stand-in of the Hub."""

import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from flacuna_jax.config.data import DataConfig, SourceConfig
from flacuna_jax.data.build import build_store
from flacuna_jax.data.files import read_records
from flacuna_jax.data.hub import DatasetName, dataset_files
from flacuna_jax.data.report import BadRecordPolicy, SourceReport
from flacuna_jax.data.source_files import source_files
from flacuna_jax.errors import UserError
from flacuna_jax.hub import HubName, fetch
from tests.data.conftest import Characters
from tests.hub_server import Hub

POLICY = BadRecordPolicy(SourceReport(""), "error")


def parquet(*outputs: str) -> bytes:
    sink = pyarrow.BufferOutputStream()
    rows = [{"instruction": "Say it.", "output": output} for output in outputs]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def card(text: str) -> bytes:
    return f"---\n{text}---\n# A dataset\n".encode()


def outputs(path: str, split: str | None = None) -> list[str]:
    files = source_files(path, split).files
    return [found.value["output"] for file in files for found in read_records(file, ("output",), POLICY)]


def test_names() -> None:
    assert DatasetName.parse("hf:codeparrot/apps") == DatasetName(HubName("codeparrot/apps"))
    assert DatasetName.parse("hf:a/b:c:validation") == DatasetName(HubName("a/b"), "c", "validation")
    assert DatasetName.parse("hf:a/b@v1::test") == DatasetName(HubName("a/b", "v1"), None, "test")
    assert DatasetName.parse("hf:a/b:c", "test") == DatasetName(HubName("a/b"), "c", "test")
    with pytest.raises(UserError, match="the path has split train, but split: test is another"):
        DatasetName.parse("hf:a/b:c:train", "test")
    for path in ("hf:", "hf::main"):
        with pytest.raises(UserError, match=r"write hf:NAME\[@REVISION\]\[:CONFIG\[:SPLIT\]\]"):
            dataset_files(path)


def test_a_dataset_is_read_like_local_files(hub: Hub, tmp_path: Path) -> None:
    """With a card that `datasets` cannot read, as that of declare-lab/flan-mini."""
    front = "dataset_info:\n  features:\n  - name: conversations\n    dtype: list\n"
    files = {"README.md": card(front), "all.json.zip": b"the same again", ".gitattributes": b""}
    hub.add("o/mini", files | {f"data/chunk_{i}.parquet": parquet(str(i)) for i in range(2)}, "dataset")
    (tmp_path / "own.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    sources = (SourceConfig(path="hf:o/mini"), SourceConfig(path=str(tmp_path / "own.jsonl")))
    store, report = build_store(DataConfig(sources=sources), Characters())
    assert [source.kept for source in report.sources] == [2, 1]
    assert store.sources[0] == "hf:o/mini"
    revision = hub.repositories["dataset", "o/mini"].commit_of("main")
    assert f"revision {revision}, split train: 2 files" in report.sources[0].notes
    assert hub.downloaded() == ["README.md", "data/chunk_0.parquet", "data/chunk_1.parquet"]


def test_the_training_split_without_a_card(hub: Hub) -> None:
    files = {"train.jsonl": b'{"output": "a"}\n', "test.jsonl": b'{"output": "b"}\n', "apps.py": b""}
    hub.add("o/apps", files, "dataset")
    assert outputs("hf:o/apps") == ["a"]
    assert hub.downloaded() == ["train.jsonl"]
    assert outputs("hf:o/apps::test") == outputs("hf:o/apps", "test") == ["b"]
    with pytest.raises(UserError, match="hf:o/apps has no split dev; it has test, train"):
        source_files("hf:o/apps", "dev")


CONFIGS = """configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: [main/test-*, more/**]}
- config_name: socratic
  data_files: socratic/*.parquet
- {config_name: folder, data_dir: plain}
"""


def test_configurations_of_a_card(hub: Hub) -> None:
    files = {
        "README.md": card(CONFIGS),
        "main/train-00000-of-00002.parquet": parquet("a"),
        "main/train-00001-of-00002.parquet": parquet("b"),
        "main/test-00000-of-00001.parquet": parquet("c"),
        "more/deep/x.parquet": parquet("d"),
        "socratic/part.parquet": parquet("e"),
        "plain/train.parquet": parquet("f"),
        "unlisted/data.parquet": parquet("g"),
    }
    hub.add("o/gsm", files, "dataset")
    assert outputs("hf:o/gsm:main") == ["a", "b"]
    assert outputs("hf:o/gsm:main:test") == ["c", "d"]
    assert outputs("hf:o/gsm:socratic") == ["e"]
    assert outputs("hf:o/gsm:folder") == ["f"]
    assert outputs("hf:o/gsm:unlisted") == ["g"]
    for path, says in {
        "hf:o/gsm": "hf:o/gsm has several configurations: main, socratic, folder; name one of them: hf:NAME",
        "hf:o/gsm:main:dev": "hf:o/gsm:main has no split dev; it has train, test: write hf:NAME",
        "hf:o/gsm:other": "no data file in a configuration or directory other .* directories are .*main, .*socratic",
    }.items():
        with pytest.raises(UserError, match=says):
            source_files(path)


@pytest.mark.parametrize("front", ["configs:\n- {config_name: other}\n- {config_name: one, default: true}\n", "x: [\n"])
def test_the_default_configuration(hub: Hub, front: str) -> None:
    hub.add("o/n", {"README.md": card(front), "train.parquet": parquet("a")}, "dataset")
    if "configs" in front:
        assert outputs("hf:o/n") == ["a"]
    else:
        with pytest.raises(UserError, match=r"hf:o/n: the dataset card .* is not valid YAML"):
            source_files("hf:o/n")


def test_a_revision(hub: Hub) -> None:
    repository = hub.add("o/n", {"train.parquet": parquet("a")}, "dataset")
    repository.branches["refs/convert/parquet"] = {"default/train/0000.parquet": parquet("b")}
    assert outputs("hf:o/n@refs/convert/parquet") == ["b"]
    assert outputs(f"hf:o/n@{repository.commit_of('main')}") == ["a"]


def test_the_cache_is_used_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    hub.add("o/n", {"train.parquet": parquet("a"), "test.parquet": parquet("b")}, "dataset")
    assert outputs("hf:o/n") == ["a"]
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    fetch.cache_clear()
    dataset_files.cache_clear()
    assert outputs("hf:o/n") == ["a"]
    with pytest.raises(UserError, match=r"test.parquet is not in the cache .*--repo-type dataset"):
        source_files("hf:o/n", "test")


def test_a_dataset_that_does_not_exist(hub: Hub) -> None:
    with pytest.raises(UserError, match=rf"^hf:a/b: {hub.url} has no dataset of this name, or it is private"):
        source_files("hf:a/b")


def test_the_message_names_the_extra_of_a_missing_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"^hf:missing/client needs the Hub client: .*flacuna-jax\[hub\]"):
        source_files("hf:missing/client")
