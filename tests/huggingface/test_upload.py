"""Uploads to the Hugging Face Hub, by the real client and a local stand-in of the Hub."""

from pathlib import Path

import pytest

from flacuna_jax import export
from flacuna_jax.cli import run_verb
from flacuna_jax.config.model import LoraConfig
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.card import Facts, adapter_card, model_card
from flacuna_jax.huggingface.upload import prepare_upload
from tests.hub_server import LARGE, READ_ONLY, TOKEN, USER, Hub, read_files


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "out"
    directory.mkdir()
    for name, data in {"config.json": b"{}", "model.safetensors": bytes(LARGE), "README.md": b"# Model\n"}.items():
        (directory / name).write_bytes(data)
    return directory


@pytest.fixture
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.mark.parametrize(
    ("name", "public", "repository", "branch"),
    [("mine", False, f"{USER}/mine", "main"), ("lab/model@v2", True, "lab/model", "v2")],
)
def test_a_repository_is_created(
    name: str, public: bool, repository: str, branch: str, hub: Hub, token: None, model: Path
) -> None:
    address = prepare_upload(name, public=public).send(model)
    assert address == f"{hub.url}/{repository}/tree/{branch}"
    made = hub.repositories["model", repository]
    assert made.private is not public
    assert made.branches[branch] == {".gitattributes": b"", **read_files(model)}
    assert made.commits == ["Upload with flacuna_jax"]


@pytest.mark.parametrize(("base", "listed"), [("/data/vicuna", False), ("lmsys/vicuna-13b-v1.1", True)])
def test_the_hub_accepts_our_cards(base: str, listed: bool, hub: Hub, token: None, model: Path) -> None:
    text = model_card(None, base, Facts(), None)
    assert (f'base_model: "{base}"' in text) is listed
    assert f"- base model: {base}" in text
    (model / "README.md").write_text(text)
    prepare_upload("lab/model").send(model)
    (model / "README.md").write_text("---\nbase_model: /data/vicuna\n---\n")
    with pytest.raises(UserError, match=r"\(ValueError: Invalid metadata in README.md. - .base_model. with value"):
        prepare_upload("lab/model").send(model)


def test_the_card_of_an_adapter_opens_a_gguf_file_as_transformers_does() -> None:
    text = adapter_card(LoraConfig(), "/models/x.Q4_1.gguf", None, Facts())
    assert 'from_pretrained("/models", gguf_file="x.Q4_1.gguf")' in text


def test_a_second_upload_replaces_the_weights_of_the_first(hub: Hub, token: None, model: Path) -> None:
    shards = {f"model-0000{i}-of-00002.safetensors": b"old" for i in (1, 2)}
    repository = hub.add("lab/model", {**shards, "model.safetensors.index.json": b"{}", "notes.txt": b"kept"})
    prepare_upload("lab/model").send(model)
    assert repository.branches["main"] == {"notes.txt": b"kept", **read_files(model)}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, r"^--push o/n: there is no token for the Hub; log in with `hf auth login`, or set HF_TOKEN"),
        (READ_ONLY, r"^--push o/n: the token can only read"),
        ("hf_unknown", r"^--push o/n: .* refuses the token"),
    ],
)
def test_the_token_is_checked_first(given: str | None, says: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    if given:
        monkeypatch.setenv("HF_TOKEN", given)
    with pytest.raises(UserError, match=says):
        prepare_upload("o/n")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["--push", "o/n/m"],
            "'o/n/m' is not the name of a repository on the Hugging Face Hub; write --push NAME[@BRANCH]",
        ),
        (["--push", "o/n"], "there is no token for the Hub"),
        (["--public"], "--public needs --push NAME"),
    ],
)
def test_errors_before_the_work(
    options: list[str], says: str, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_verb(export.main, [str(tmp_path / "no run"), str(tmp_path / "out"), "--format", "merged", *options]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("refused", ["/preupload/", "/store/", "/commit/", "/repos/create"])
def test_a_failure_leaves_the_directory_and_says_how_to_upload_it(
    refused: str, hub: Hub, token: None, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # the client tries again
    upload, hub.refuse = prepare_upload("lab/model@v2"), refused
    command = rf"hf upload lab/model {model} \. --revision v2 --private$"
    with pytest.raises(UserError, match=rf"^--push lab/model: .*{model} is complete; to upload it later: {command}"):
        upload.send(model)
    assert (model / "model.safetensors").is_file()
