"""Messages for a missing checkpoint directory."""

from pathlib import Path

import pytest

from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.files.place import require_directory


def test_a_directory_is_accepted(tmp_path: Path) -> None:
    assert require_directory(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (
            "lmsys/vicuna-7b-v1.1",
            "checkpoint directory; for one of the Hugging Face Hub, write hf:lmsys/vicuna-7b-v1.1$",
        ),
        ("models/vicuna-7b", "checkpoint directory; for one of the Hugging Face Hub, write hf:NAME$"),
        ("mine/base", "checkpoint directory; for one of the Hugging Face Hub, write hf:NAME$"),
        ("/nowhere/at/all", "checkpoint directory$"),
        ("vicuna", "checkpoint directory$"),
    ],
)
def test_the_message_for_a_name_on_the_hub_has_its_prefix(
    path: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match=says):
        require_directory(path)
