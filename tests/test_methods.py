"""Combinations of methods, run as by a user; and every snippet of docs/reference/methods.md is a config."""

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from flacuna_jax.cli import main as flacuna
from flacuna_jax.config.files import parse_config
from flacuna_jax.config.run import RunConfig
from flacuna_jax.generation.language_model import ScoreRequest
from flacuna_jax.huggingface.adapter import read_adapter
from flacuna_jax.inference import ModelAddress, ModelLoader
from flacuna_jax.model.quantized import NF4Kernel
from tests.small_run import write_run

pytestmark = pytest.mark.usefixtures("compiled_once")

DOCS = Path(__file__).parents[1] / "docs" / "reference" / "methods.md"
SNIPPETS = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
SECTIONS = re.findall(r"^## (.+)$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_of_the_docs_are_settings(snippet: str) -> None:
    whole = {"output_dir": "runs/x", "model": {"path": "models/x"}, "data": {"sources": [{"path": "x.json"}]}}
    for section, settings in yaml.safe_load(snippet).items():
        whole[section] = settings if settings is None else {**whole.get(section, {}), **settings}
    assert isinstance(parse_config(whole), RunConfig)


def test_every_section_has_a_snippet() -> None:
    assert len(SNIPPETS) >= len(SECTIONS) - 1  # the last section lists comparisons


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained from scratch with Lion and full fine-tuning, whose rows are as long as NF4's blocks."""
    directory = tmp_path_factory.mktemp("base")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    architecture = {**sizes, "max_position_embeddings": 256}
    config = write_run(
        directory,
        lora=None,
        model={"architecture": architecture},
        training={"optimizer": "lion", "learning_rate": 2e-3, "schedule": "inverse_sqrt", "max_steps": 4},
    )
    assert flacuna(["train", "--config", str(config)]) == 0
    return directory


@pytest.mark.slow
def test_methods_go_together(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DoRA with patterns on an NF4 base at twice its context, LoRA+ with Adafactor: trained, continued, merged."""
    settings = [
        f"--model={{path: {base / 'run' / 'model'}, dtype: float32, quantization: nf4}}",
        "--model.rope_scaling={type: linear}",
        "--data.max_length=512",
        "--lora={rank: 4, targets: all-linear, use_dora: true, rank_pattern: {q_proj: 2}, layers_to_transform: [1]}",
        "--training={optimizer: adafactor, lora_plus_ratio: 4, learning_rate: 0.01, batch_size: 8, max_steps: 3}",
    ]
    run = tmp_path / "run"
    assert flacuna(["train", "--config", str(base / "config.yaml"), f"--output_dir={run}", *settings]) == 0
    printed = capsys.readouterr().out
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    assert f"{sum(tensor.size for tensor in tensors.values()):,} trainable" in printed
    assert tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"].shape == (2, 64)
    assert not any("layers.0." in name for name in tensors)
    moved = tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    assert np.abs(moved).max() > 1e-3

    again = tmp_path / "again"
    resumed = [
        *settings,
        f"--lora.init_from={run / 'adapter'}",
    ]  # the same number of steps, so that compiled programs are reused
    assert flacuna(["train", "--config", str(base / "config.yaml"), f"--output_dir={again}", *resumed]) == 0
    first, second = (
        json.loads((directory / "metrics.jsonl").read_text().splitlines()[0])["loss"] for directory in (run, again)
    )
    assert second < first

    loaded = ModelLoader("float32").load(ModelAddress(base / "run" / "model", run))
    assert loaded.spec.config.rope_scaling is not None
    assert loaded.spec.config.rope_scaling.factor == 2
    assert loaded.spec.quantization == "nf4", "like the run"
    capsys.readouterr()
    merged = ["--format", "merged", "--golden-tokens", "0"]
    assert flacuna(["export", str(run), str(tmp_path / "merged"), *merged, "--merge-base", "stored"]) == 0
    assert "logits differ by up to" in capsys.readouterr().out
    assert flacuna(["export", str(run), str(tmp_path / "rounded"), *merged]) == 0
    assert "that training used, dequantised from nf4" in capsys.readouterr().out
    asked = [ScoreRequest((1, 5, 9, 30), (7, 11, 4))]
    (trained,) = loaded.loglikelihood(asked)
    for directory, same in (("rounded", True), ("merged", False)):
        (score,) = ModelLoader("float32").load(ModelAddress(tmp_path / directory)).loglikelihood(asked)
        # Three log-probabilities, each rounded in float32; NF4 changes them a thousand times as much.
        assert (abs(score.log_probability - trained.log_probability) < 1e-4) == same
    on_stored = ModelLoader("float32", stored_base=True).load(ModelAddress(base / "run" / "model", run))
    assert on_stored.loglikelihood(asked)[0].log_probability == pytest.approx(score.log_probability, abs=1e-4)
    assert on_stored.fingerprint != loaded.fingerprint, "the answers are cached separately"
    for layer, module in ((0, "layers/q_proj"), (1, "layers/down_proj")):
        name = f"{loaded.spec.linear[module].of_layer(layer)}.weight"
        kernel = load_file(base / "run" / "model" / "model.safetensors")[name]
        seen = np.asarray(NF4Kernel(jnp.asarray(kernel)).dequantized((None, None), jnp.float32))
        adapter = read_adapter(run / "adapter", loaded.spec.config)
        for directory, weight in (("merged", kernel), ("rounded", seen)):
            found = load_file(tmp_path / directory / "model.safetensors")[name]
            np.testing.assert_allclose(found, adapter.merge(weight, module, layer), atol=1e-6)
        assert np.abs(seen - kernel).max() > 1e-3

    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written["rope_scaling"] == {"rope_type": "linear", "type": "linear", "factor": 2.0}
