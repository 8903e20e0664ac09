"""Stores on disk, and a model that asks only for what they lack."""

from pathlib import Path

import pytest

from flacuna_jax.errors import UserError
from flacuna_jax.evaluation.cache import CachedModel, Store, directory_fingerprint
from flacuna_jax.generation.language_model import GenerationRequest
from tests.evaluation.models import Scripted


def test_a_store_is_for_one_process_at_a_time(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.jsonl")
    with pytest.raises(UserError, match="in use by another evaluation"):
        Store(tmp_path / "s.jsonl")
    store.close()
    Store(tmp_path / "s.jsonl").close()


def test_a_damaged_store_is_an_error_and_an_incomplete_end_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text('{"key": "a", "value": 1}\n{"key": "b", "va')
    store = Store(path)
    assert (len(store), store.get("a"), store.get("b")) == (1, 1, None)
    store.put("b", "ü\n")
    store.close()
    assert Store(path).get("b") == "ü\n"
    path.write_text('what\n{"key": "a", "value": 1}\n')
    with pytest.raises(UserError, match="line 1, is not a cache entry"):
        Store(path)


def test_progress_begins_before_the_first_answer(tmp_path: Path) -> None:
    store, seen = Store(tmp_path / "s.jsonl"), list[tuple[int, int, int]]()
    scripted = Scripted(answer=lambda prompt: prompt)
    model = CachedModel(scripted, store, lambda done, total: seen.append((done, total, len(scripted.asked))))
    requests = [GenerationRequest((3 + ord(c),), 2) for c in "abc"]
    model.generate(requests[:1])
    model.generate([*requests, *requests])
    model.generate(requests)
    store.close()
    assert seen == [(0, 1, 0), (1, 1, 1), (1, 3, 1), (3, 3, 3)]


def test_fingerprint_depends_on_the_content(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    first = directory_fingerprint([tmp_path])
    (tmp_path / "a").touch()
    assert directory_fingerprint([tmp_path]) == first
    (tmp_path / "a").write_bytes(b"x" * 99 + b"y")
    assert directory_fingerprint([tmp_path]) != first
    assert directory_fingerprint([tmp_path], "bfloat16") != directory_fingerprint([tmp_path])


def test_fingerprint_detects_changes_in_large_files(tmp_path: Path) -> None:
    path = tmp_path / "w"
    with open(path, "wb") as file:
        file.truncate(200 << 20)
    first = directory_fingerprint([tmp_path])
    with open(path, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert directory_fingerprint([tmp_path]) != first
