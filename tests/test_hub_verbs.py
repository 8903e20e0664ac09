"""Every command with names on the Hugging Face Hub: a run from hf:NAME to `--push NAME`, and back."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from flacuna_jax import check, convert, export, generate, plan, prepare, train
from flacuna_jax.cli import run_verb
from flacuna_jax.huggingface.architecture import hugging_face_config
from flacuna_jax.huggingface.golden import read_golden
from flacuna_jax.inference import ModelAddress
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import base_parameters
from tests.hub_server import TOKEN, Hub, Repository, hub_for_client
from tests.small_run import records, write_tokenizer

pytest.importorskip("huggingface_hub", reason="needs the hub extra")
pytestmark = pytest.mark.usefixtures("compiled_once")

CONFIG = LlamaConfig(340, 8, 8, 1, 2, 2, 4, max_position_embeddings=256)
TOKENS = 2


class Scene(NamedTuple):
    hub: Hub
    directory: Path
    config: Path
    planned: list[str]
    """The files that `plan` and `prepare` downloaded before the training run."""


def write_base(directory: Path) -> Path:
    """A random model with a tokenizer, in Hugging Face form."""
    write_tokenizer(directory)
    rng = np.random.default_rng(0)
    tensors = {
        name: (rng.standard_normal(parameter.layer_shape) * 0.2 + (parameter.kind == "norm")).astype(np.float32)
        for parameter in base_parameters(CONFIG).values()
        for name in parameter.tensors
    }
    save_file(tensors, directory / "model.safetensors")
    content = hugging_face_config(CONFIG, np.dtype(np.float32), bos_token_id=1, eos_token_id=2)
    (directory / "config.json").write_text(json.dumps(content))
    return directory


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, compiled_once: None) -> Iterator[Scene]:
    """A finished run on a base, a tokenizer and data of the Hub, after `plan` and `prepare`."""
    directory = tmp_path_factory.mktemp("hub_verbs")
    with hub_for_client(directory) as hub:
        repository = hub.add("lab/base", write_base(directory / "base"))
        repository.branches["v1"] = dict(repository.branches["main"])
        hub.add("lab/words", {"data/chunk_0.json": json.dumps(records(24)).encode()}, "dataset")
        tree = {
            "output_dir": str(directory / "run"),
            "model": {"path": "hf:lab/base@v1", "tokenizer": "hf:lab/base", "dtype": "float32"},
            "lora": {"rank": 2},
            "data": {"sources": [{"path": "hf:lab/words"}], "max_length": 256},
            "training": {"learning_rate": 1e-2, "batch_size": 8, "micro_batch_size": 1, "remat": "none"},
            "mesh": {"fsdp": 1},
            "logging": {"tensorboard": False},
        }
        config = directory / "config.yaml"
        config.write_text(yaml.safe_dump(tree))
        assert run_verb(plan.main, ["--config", str(config), "--estimate"]) == 0
        assert run_verb(prepare.main, ["--config", str(config), "--show", "1"]) == 0
        planned = hub.downloaded()
        assert run_verb(train.main, ["--config", str(config)]) == 0
        yield Scene(hub, directory, config, planned)


def test_plan_and_prepare_download_no_weights(scene: Scene) -> None:
    assert scene.planned == ["config.json", "data/chunk_0.json", "tokenizer.model"]
    assert "model.safetensors" in scene.hub.downloaded()


def test_a_run_keeps_the_names(scene: Scene) -> None:
    run = scene.directory / "run"
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["model"]["path"] == "hf:lab/base@v1"
    assert settings["data"]["sources"][0]["path"] == "hf:lab/words"
    adapter = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("lab/base", "v1")
    card = (run / "adapter" / "README.md").read_text()
    assert 'base_model: "lab/base"' in card
    assert 'from_pretrained("lab/base", revision="v1")' in card
    assert "- data: hf:lab/words" in card


@pytest.mark.slow
def test_peft_reads_the_name_of_the_base(scene: Scene) -> None:
    peft = pytest.importorskip("peft", reason="compares with PEFT")
    config = peft.PeftConfig.from_pretrained(str(scene.directory / "run" / "adapter"))
    assert (config.base_model_name_or_path, config.revision) == ("lab/base", "v1")


def test_convert(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb(convert.main, ["hf:lab/base", str(scene.directory / "native")]) == 0
    assert (scene.directory / "native" / "tokenizer.model").is_file()
    assert "read back and verified" in capsys.readouterr().out


@pytest.fixture(scope="module")
def pushed(scene: Scene) -> Iterator[dict[str, Repository]]:
    """The run's adapter and its merged model, pushed to the Hub."""
    run, out = str(scene.directory / "run"), scene.directory
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        arguments = ["--format", "adapter", "--push", "tuned@first"]
        assert run_verb(export.main, [run, str(out / "adapter"), *arguments]) == 0
        arguments = ["--format", "merged", "--golden-tokens", str(TOKENS), "--push", "lab/merged", "--public"]
        assert run_verb(export.main, [run, str(out / "merged"), *arguments]) == 0
        yield {
            "adapter": scene.hub.repositories["model", "ann/tuned"],
            "merged": scene.hub.repositories["model", "lab/merged"],
        }


def test_an_exported_adapter_is_pushed(scene: Scene, pushed: dict[str, Repository]) -> None:
    repository = pushed["adapter"]
    assert repository.private
    assert repository.commits == ["Upload with flacuna_jax"]
    assert set(repository.branches["main"]) == {".gitattributes"}
    files = {path: data for path, data in repository.branches["first"].items() if path != ".gitattributes"}
    assert files == {path.name: path.read_bytes() for path in (scene.directory / "adapter").iterdir()}


def test_generate_with_a_model_and_an_adapter_of_the_hub(
    scene: Scene, pushed: dict[str, Repository], capsys: pytest.CaptureFixture[str]
) -> None:
    record = read_golden(scene.directory / "merged")[0][0]
    names = ["--model", "hf:lab/base", "--adapter", "hf:ann/tuned@first"]
    options = ["--max-new-tokens", str(TOKENS), "--dtype", "float32", "--json"]
    assert run_verb(generate.main, [*names, record.message, *options]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == record.continuation
    assert ModelAddress.parse("hf:lab/base@v1+hf:ann/tuned@first").name == "base+tuned"


def test_check_a_pushed_model(scene: Scene, pushed: dict[str, Repository], capsys: pytest.CaptureFixture[str]) -> None:
    assert not pushed["merged"].private
    assert run_verb(check.main, ["hf:lab/merged"]) == 0
    assert "golden prompts: ids and greedy answers match" in capsys.readouterr().out


def test_merge_an_adapter_of_the_hub(scene: Scene, pushed: dict[str, Repository]) -> None:
    arguments = ["--adapter", "hf:ann/tuned@first", "--model", "hf:lab/base", "--golden-tokens", "0"]
    out = scene.directory / "merged again"
    assert run_verb(export.main, [str(out), "--format", "merged", *arguments]) == 0
    assert (out / "model.safetensors").read_bytes() == (scene.directory / "merged" / "model.safetensors").read_bytes()
    assert "- adapter: hf:ann/tuned@first" in (out / "README.md").read_text()
