"""What is said where a checkpoint should lie and does not."""

from pathlib import Path

import pytest

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.files.place import require_directory


def test_a_directory_is_taken(tmp_path: Path) -> None:
    assert require_directory(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("lmsys/vicuna-7b-v1.1", "expected; .*: hf download lmsys/vicuna-7b-v1.1 --local-dir models/vicuna-7b-v1.1$"),
        ("models/vicuna-7b", "expected; .*: hf download NAME --local-dir models/vicuna-7b$"),
        ("mine/base", "expected; .*: hf download NAME --local-dir mine/base$"),
        ("/nowhere/at/all", "expected$"),
        ("vicuna", "expected$"),
    ],
)
def test_what_is_not_there_is_told_how_to_fetch(
    path: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match=says):
        require_directory(path)
