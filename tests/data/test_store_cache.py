import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flacuna_jax.config.data import DataConfig, SourceConfig
from flacuna_jax.data import store_cache
from flacuna_jax.data.build import build_store
from flacuna_jax.data.report import DataReport
from flacuna_jax.data.store import TokenStore
from flacuna_jax.data.store_cache import cached_store
from flacuna_jax.errors import UserError
from tests.data.conftest import Characters


def rows(count: int, prefix: str = "") -> str:
    records = [
        {"conversations": [{"from": "human", "value": f"{prefix}{i}"}, {"from": "gpt", "value": "a" * (i % 7)}],
         "source": f"task{i % 5}", "id": f"é{i}"}
        for i in range(count)
    ]  # fmt: skip
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    (tmp_path / "one.jsonl").write_text(rows(1500))
    (tmp_path / "two.jsonl").write_text(rows(700, "other ") + "{torn\n")
    sources = tuple(SourceConfig(path=str(tmp_path / name)) for name in ("one.jsonl", "two.jsonl"))
    return DataConfig(sources=sources, on_bad_record="skip", max_length=400)


def look(config: DataConfig, directory: Path, tokenizer_hash: str = "t") -> tuple[TokenStore, DataReport, str]:
    said: list[str] = []
    store, report = cached_store(config, Characters(), tokenizer_hash, directory, said.append)
    return store, report, "\n".join(said)


def assert_equal(one: TokenStore, other: TokenStore) -> None:
    for field in fields(TokenStore):
        a, b = getattr(one, field.name), getattr(other, field.name)
        same = np.array_equal(a, b) and a.dtype == b.dtype if isinstance(a, np.ndarray) else a == b
        assert same, field.name


@pytest.mark.parametrize("part", [1, 600, 10**6])
def test_the_result_equals_build_store_for_any_part_size(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    monkeypatch.setattr(store_cache, "PART_EXAMPLES", part)
    expected_store, expected_report = build_store(config, Characters())
    for expected_word in ("tokenised data: not in the cache yet; building", "hit"):
        store, report, said = look(config, tmp_path / "cache")
        assert expected_word in said
        assert_equal(store, expected_store)
        assert report == expected_report
        assert store.fingerprint == expected_store.fingerprint
        assert store.example(3).id == expected_store.example(3).id
    assert not isinstance(store.tokens, np.memmap)
    assert isinstance(store.tokens.base, np.memmap)  # mapped, not read
    assert not list((tmp_path / "cache").glob("*.parts"))


def test_a_miss_names_the_differences(config: DataConfig, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    look(config, cache)
    assert "differs in settings.max_length;" in look(config.model_copy(update={"max_length": 300}), cache)[2]
    assert "differs in tokenizer;" in look(config, cache, "another")[2]
    (tmp_path / "two.jsonl").write_text(rows(700, "changed "))
    assert "differs in sources.1.files.two.jsonl;" in look(config, cache)[2]
    fewer = config.sources[0].model_copy(update={"max_examples": 10})
    assert (
        "differs in sources.0.max_examples;"
        in look(config.model_copy(update={"sources": (fewer, config.sources[1])}), cache)[2]
    )


def test_weights_packing_and_moved_files_need_no_new_tokens(config: DataConfig, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    look(config, cache)
    heavier = tuple(source.model_copy(update={"weight": 2.5}) for source in config.sources)
    assert "hit" in look(config.model_copy(update={"sources": heavier, "packing": "none"}), cache)[2]
    (tmp_path / "moved").mkdir()
    moved = []
    for name in ("one.jsonl", "two.jsonl"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
        moved.append(SourceConfig(path=str(tmp_path / "moved" / name)))
    store, report, said = look(config.model_copy(update={"sources": tuple(moved)}), cache)
    assert "hit" in said
    assert store.sources == tuple(source.path for source in moved)
    assert [source.path for source in report.sources] == list(store.sources)


@pytest.mark.parametrize("damage", ["truncate", "remove", "garbage", "one bit"])
def test_a_damaged_corpus_is_built_again(config: DataConfig, tmp_path: Path, damage: str) -> None:
    cache = tmp_path / "cache"
    expected, _, _ = look(config, cache)
    expected_tokens = np.array(expected.tokens)
    (tokens,) = cache.glob("*/tokens.npy")
    if damage == "remove":
        tokens.unlink()
    else:
        content = bytearray(tokens.read_bytes())
        content[len(content) // 2] ^= 1
        tokens.write_bytes({"truncate": content[:500], "garbage": b"junk", "one bit": content}[damage])
    store, _, said = look(config, cache)
    assert "miss, the corpus in the cache is damaged" in said
    assert np.array_equal(store.tokens, expected_tokens)


def test_corpora_unopened_for_a_month_are_removed(config: DataConfig, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for length in (310, 320, 330, 340):
        look(config.model_copy(update={"max_length": length}), cache)
    kept, opened, locked, unused = sorted((p for p in cache.iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime)
    (cache / "0123.parts").mkdir()  # no files of ours
    unfinished = cache / f"{'ab' * 16}.parts"
    unfinished.mkdir()
    old = time.time() - (store_cache.UNUSED_DAYS + 1) * 86400
    for path in (opened, locked, unused, unfinished, cache / "0123.parts"):
        os.utime(path, (old, old))
    assert "hit" in look(config.model_copy(update={"max_length": 320}), cache)[2]
    with (cache / f"{locked.name}.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # another process is using it
        said = look(config, cache)[2]
    assert said.count("removed, unused for 30 days") == 2
    assert [path.exists() for path in (kept, opened, locked, unused, unfinished)] == [True, True, True, False, False]
    assert (cache / "0123.parts").exists()


_KILLED = """
import os, signal, sys
from flacuna_jax.config.data import DataConfig
from flacuna_jax.data import store_cache
from tests.data.conftest import Characters
store_cache.PART_EXAMPLES = 300
from pathlib import Path
move, left = store_cache._sync_and_move, [int(sys.argv[3])]
def move_and_die(partial, place):
    move(partial, place)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
store_cache._sync_and_move = move_and_die
config = DataConfig.model_validate_json(sys.argv[1], strict=False)
store_cache.cached_store(config, Characters(), "t", Path(sys.argv[2]), print)
"""


@pytest.mark.parametrize("after", [1, 3, 5])
def test_a_killed_build_continues_from_its_parts(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    monkeypatch.setattr(store_cache, "PART_EXAMPLES", 300)
    cache = tmp_path / "cache"
    killed = subprocess.run(
        [sys.executable, "-c", _KILLED, config.model_dump_json(), str(cache), str(after)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    store, report, said = look(config, cache)
    assert "continuing after" in said
    expected_store, expected_report = build_store(config, Characters())
    assert_equal(store, expected_store)
    assert report == expected_report


def test_a_source_without_examples_is_an_error_and_nothing_is_kept(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "a", "completion": ""}) + "\n")
    config = DataConfig(sources=(SourceConfig(path=str(tmp_path / "x.jsonl")),))
    with pytest.raises(UserError, match="no usable example"):
        look(config, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/store.json"))


def test_a_file_that_changes_while_it_is_read_is_an_error_and_nothing_is_kept(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the cache would return the new content for the key of the old."""
    build, source = store_cache._build, Path(config.sources[0].path)
    content = source.read_text()

    def change_and_build(*arguments: Any) -> Any:
        source.write_text(content.replace('"aaa"', '"bbb"'))
        return build(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(store_cache, "_build", change_and_build)
        with pytest.raises(UserError, match=r"one\.jsonl was changed while it was read; start again"):
            look(config, tmp_path / "cache")
    source.write_text(content)
    assert_equal(look(config, tmp_path / "cache")[0], build_store(config, Characters())[0])


_ON_A_SMALL_DISK = """
import sys
from flacuna_jax.config.data import DataConfig
from flacuna_jax.data.store_cache import cached_store
from pathlib import Path
from tests.data.conftest import Characters
config = DataConfig.model_validate_json(sys.argv[1], strict=False)
try:
    cached_store(config, Characters(), "t", Path(sys.argv[2]), print)
except OSError as error:
    print("failed:", error)
"""


def test_a_full_disk_is_an_error_and_does_not_kill_the_process(config: DataConfig, tmp_path: Path) -> None:
    """The disk has enough space for the parts, but not for the whole corpus in addition."""
    place = tmp_path / "disk"
    look(config, tmp_path / "cache")
    size = int(1.5 * sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.npy")))
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        built = subprocess.run(
            [sys.executable, "-c", _ON_A_SMALL_DISK, config.model_dump_json(), str(place / "cache")],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            check=False,
        )
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
    assert built.returncode == 0, f"signal {-built.returncode}"
    assert "failed: [Errno 28] No space left on device" in built.stdout
