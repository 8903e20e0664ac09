"""Names on the Hugging Face Hub, by the real client and a local stand-in of the Hub."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flacuna_jax.errors import UserError
from flacuna_jax.hub import HubName, fetch, name_of, snapshot_of
from flacuna_jax.huggingface.files.place import local_checkpoint
from tests.hub_server import LARGE, READ_ONLY, TOKEN, Hub

WEIGHTS = bytes(range(256)) * (LARGE // 64)
MODEL = {
    "config.json": b"{}",
    "tokenizer.model": b"pieces",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"older",
    "consolidated.safetensors": b"another layout",
    "training_args.bin": b"a pickle",
    "README.md": b"",
    "onnx/model.onnx": b"another format",
}


def test_names() -> None:
    assert HubName.parse("hf:a/b") == HubName("a/b")
    assert HubName.parse("hf:a/b@refs/pr/1") == HubName("a/b", "refs/pr/1")
    assert str(HubName("a/b", "v1")) == "hf:a/b@v1"
    for text in ("hf:", "hf:a/b@", "hf:a/b/c", "hf:@main", "hf:a b"):
        with pytest.raises(UserError, match=r"is not the name of a repository .*; write hf:NAME\[@REVISION\]"):
            HubName.parse(text)


def test_names_of_models() -> None:
    assert HubName.parse_model("hf:a/b@v1:sub/Q4_K_M.gguf") == HubName("a/b", "v1", "sub/Q4_K_M.gguf")
    assert str(HubName("a/b", "v1", "c.gguf")) == "hf:a/b@v1:c.gguf"
    with pytest.raises(UserError, match=r"'hf:a/b:' has no file after the colon; write hf:NAME"):
        HubName.parse_model("hf:a/b:")


@pytest.mark.parametrize(
    "address", ["https://huggingface.co/a/b/tree/main", "hf.co/a/b", "huggingface.co/a/b", "HF:a/b", "hf://a/b"]
)
def test_other_ways_to_write_a_name_are_corrected(address: str) -> None:
    with pytest.raises(UserError, match=r"for this repository of the Hugging Face Hub, write hf:a/b$"):
        local_checkpoint(address)


def test_only_needed_files_are_downloaded_and_only_once(hub: Hub) -> None:
    hub.add("o/n", MODEL)
    settings = local_checkpoint("hf:o/n", weights=False)
    assert hub.downloaded() == ["config.json", "tokenizer.model"]
    directory = local_checkpoint("hf:o/n")
    assert directory == settings
    assert (directory / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.downloaded() == ["config.json", "model.safetensors", "tokenizer.model"]
    hub.requests.clear()
    fetch.cache_clear()
    assert local_checkpoint("hf:o/n") == directory
    assert hub.requests == ["GET /api/models/o/n"]


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"], slice(None)),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "pytorch_model.bin"], slice(2)),
        (["adapter_model.safetensors", "adapter_model.bin"], slice(1)),
        (["adapter_model.bin"], slice(None)),
    ],
)
def test_weights(files: list[str], chosen: slice, hub: Hub) -> None:
    hub.add("o/n", {"config.json": b"{}", **dict.fromkeys(files, b"x")})
    directory = local_checkpoint("hf:o/n")
    assert sorted(path.name for path in directory.iterdir()) == sorted(["config.json", *files[chosen]])


def test_a_revision(hub: Hub) -> None:
    repository = hub.add("o/n", MODEL)
    repository.branches["v2"] = {**MODEL, "config.json": b'{"second": 2}'}
    assert (local_checkpoint("hf:o/n@v2", weights=False) / "config.json").read_bytes() == b'{"second": 2}'
    commit = repository.commit_of("main")
    assert local_checkpoint(f"hf:o/n@{commit}", weights=False).name == commit


def test_an_interrupted_transfer_continues(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    file_download = pytest.importorskip("huggingface_hub.file_download")
    monkeypatch.setattr(file_download.constants, "DOWNLOAD_CHUNK_SIZE", 100)
    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)
    hub.add("o/n", MODEL)
    hub.interruptions += [1050, 2050]
    assert (local_checkpoint("hf:o/n") / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.ranges == ["bytes=1000-", "bytes=3000-"]


def test_after_a_failure_only_the_missing_files_are_transferred(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    file_download = pytest.importorskip("huggingface_hub.file_download")
    monkeypatch.setattr(file_download.time, "sleep", lambda _: None)
    hub.add("o/n", MODEL)
    hub.interruptions += [0] * 10
    with pytest.raises(UserError, match=r"^hf:o/n: the transfer failed .* only the missing files"):
        local_checkpoint("hf:o/n")
    hub.interruptions.clear()
    hub.requests.clear()
    assert (local_checkpoint("hf:o/n") / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.downloaded() == ["model.safetensors"]


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    fetch.cache_clear()


def test_the_cache_is_used_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("o/n", MODEL)
    directory = local_checkpoint("hf:o/n")
    offline(monkeypatch)
    hub.requests.clear()
    assert local_checkpoint("hf:o/n") == directory
    assert hub.requests == []
    with pytest.raises(UserError, match=r"^hf:o/n@v2 is not in the cache .*: hf download o/n --revision v2$"):
        local_checkpoint("hf:o/n@v2")


def test_a_cache_with_settings_only_is_not_enough_for_weights_offline(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("o/n", MODEL)
    local_checkpoint("hf:o/n", weights=False)
    offline(monkeypatch)
    with pytest.raises(UserError, match=r"hf:o/n: model.safetensors is not in the cache .*unset HF_HUB_OFFLINE"):
        local_checkpoint("hf:o/n")


@pytest.mark.parametrize("token", [None, READ_ONLY])
def test_a_gated_repository(hub: Hub, token: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("o/n", MODEL, gated=True)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError, match=rf"^hf:o/n: it is gated: accept its conditions at {hub.url}/o/n, .*HF_TOKEN$"):
        local_checkpoint("hf:o/n")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert (local_checkpoint("hf:o/n") / "model.safetensors").is_file()


def test_repositories_that_do_not_exist(hub: Hub) -> None:
    hub.add("o/n", MODEL)
    with pytest.raises(UserError, match=rf"^hf:o/m: {hub.url} has no model of this name, or it is private"):
        local_checkpoint("hf:o/m")
    with pytest.raises(UserError, match=rf"^hf:o/n@v3: there is no revision v3 of this model; {hub.url}/o/n lists"):
        local_checkpoint("hf:o/n@v3")
    hub.add("o/data", {"README.md": b""})
    with pytest.raises(UserError, match="hf:o/data has no weights of a model or an adapter"):
        local_checkpoint("hf:o/data")


def test_a_cache_that_cannot_be_written(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    (tmp_path / "file").touch()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    hub.add("o/n", MODEL)
    with pytest.raises(UserError, match=r"^hf:o/n: .*file.* cannot be written to .*set HF_HOME to a directory"):
        local_checkpoint("hf:o/n")


def test_a_hub_that_does_not_answer(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"^hf:o/n: the transfer failed \(ConnectError: .*HF_HUB_OFFLINE=1"):
        local_checkpoint("hf:o/n")


def test_a_directory_of_the_cache_is_opened_at_its_snapshot(tmp_path: Path) -> None:
    directory = tmp_path / "models--o--some--model"
    for commit in ("abc", "def"):
        (directory / "snapshots" / commit).mkdir(parents=True)
    with pytest.raises(UserError, match=r"has 2 snapshots and no main; give one of its snapshots: .*abc, .*def"):
        snapshot_of(directory)
    (directory / "refs").mkdir()
    (directory / "refs" / "main").write_text("def")
    assert local_checkpoint(directory) == directory / "snapshots" / "def"
    assert name_of(directory / "snapshots" / "def") == "model"
    assert name_of(tmp_path / "mine" / "adapter") == name_of(tmp_path / "mine" / "model") == "mine"
    assert snapshot_of(tmp_path / "models--elsewhere") == tmp_path / "models--elsewhere"


def test_processes_of_a_host_download_a_file_once(hub: Hub, tmp_path: Path) -> None:
    hub.add("o/n", MODEL)
    program = "from flacuna_jax.huggingface.files.place import local_checkpoint as at; print(at('hf:o/n'))"
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    environment = {**os.environ, **settings, "HF_HUB_DISABLE_XET": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=240) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    assert (Path(outputs[0][0].decode().strip()) / "model.safetensors").read_bytes() == WEIGHTS
    assert sum(request.startswith("GET /large/") for request in hub.requests) == 1
