import errno
import os
from pathlib import Path

import pytest

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.directories import whole_directory


def test_the_name_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with whole_directory(target) as partial:
        (partial / "file").write_text("x")
        assert not target.exists()
        assert partial.parent == target.parent
    assert (target / "file").read_text() == "x"
    assert [path.name for path in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    def fail(partial: Path) -> None:
        (partial / "file").write_text("x")
        raise error

    with pytest.raises(error), whole_directory(tmp_path / "out") as partial:
        fail(partial)
    assert not list(tmp_path.iterdir())


def test_an_empty_directory_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with whole_directory(tmp_path / "out") as partial:
        (partial / "file").touch()
    assert (tmp_path / "out" / "file").exists()


def test_an_existing_target_is_an_error_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is not a directory"), whole_directory(tmp_path / "file"):
        pytest.fail("the block must not run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    with pytest.raises(UserError, match="not empty"), whole_directory(tmp_path / "full"):
        pytest.fail("the block must not run")
    with pytest.raises(UserError, match="cannot be created"), whole_directory(tmp_path / "file" / "below"):
        pytest.fail("the block must not run")


def test_a_failed_replacement_keeps_the_old(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(RuntimeError), whole_directory(tmp_path / "out", replace=True):
        raise RuntimeError
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]


def test_remains_of_killed_writers_are_removed_if_replace_is_set(tmp_path: Path) -> None:
    for left in ("out.partial-0123abcd", "out.retired-0123abcd", "other.partial-0123abcd"):
        (tmp_path / left).mkdir()
    with whole_directory(tmp_path / "first"):
        pass
    assert len(list(tmp_path.iterdir())) == 4, "another process may be writing"
    with whole_directory(tmp_path / "out", replace=True) as partial:
        (partial / "file").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "other.partial-0123abcd", "out"]


def test_a_full_disk_is_one_message_and_differs_from_an_unreadable_source(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        pytest.raises(UserError, match="out cannot be written: No space left"),
        whole_directory(tmp_path / "d" / "out"),
    ):
        raise full
    with pytest.raises(UserError, match="out cannot be written: No such file"), whole_directory(tmp_path / "d" / "out"):
        (tmp_path / "d" / "gone").read_text()
    with pytest.raises(FileNotFoundError), whole_directory(tmp_path / "d" / "out"):
        (tmp_path / "source").read_text()
