from pathlib import Path
from typing import Any

import datasets
import pytest

from flacuna_jax.errors import UserError
from flacuna_jax.flan_mini.config import MixtureSource
from flacuna_jax.flan_mini.hub import HubName, resolve
from flacuna_jax.flan_mini.readers import READERS


def source(path: str) -> MixtureSource:
    return MixtureSource(name="apps", kind="apps", path=path, examples=1)


def test_names() -> None:
    assert HubName.parse("hf:codeparrot/apps") == HubName("codeparrot/apps", None, "train")
    assert HubName.parse("hf:a/b:c:validation") == HubName("a/b", "c", "validation")
    assert HubName.parse("hf:a/b::test").file == "a--b-test.parquet"


def test_local_paths_are_left_alone(tmp_path: Path) -> None:
    assert resolve(source("data/apps"), tmp_path).path == "data/apps"


def test_a_hub_dataset_is_fetched_once_and_read_as_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(*arguments: Any, **options: Any) -> datasets.Dataset:
        calls.append((arguments, options))
        return datasets.Dataset.from_list([{"question": "q", "solutions": '["print(1)"]', "starter_code": ""}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    for _ in range(2):
        found = resolve(source("hf:codeparrot/apps"), tmp_path)
        assert len(READERS["apps"].find(found).files) == 1
    assert calls == [(("codeparrot/apps", None), {"split": "train"})]


def test_an_unreachable_hub_is_an_error_that_names_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UserError, match=r"sources\.apps: hf:a/b could not be fetched .*no network"):
        resolve(source("hf:a/b"), tmp_path)
    assert not list(tmp_path.rglob("*.parquet"))
