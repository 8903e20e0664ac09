"""`flacuna export` from the command line, with run directories like those of training."""

import itertools
import json
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flacuna_jax import export
from flacuna_jax.cli import run_verb
from flacuna_jax.config.files import parse_config
from flacuna_jax.config.model import LoraConfig
from flacuna_jax.config.run import RunConfig
from flacuna_jax.evaluation.results import Outcome, TaskResult, write_result
from flacuna_jax.huggingface import deliver
from flacuna_jax.huggingface.adapter import Adapter, read_adapter
from flacuna_jax.huggingface.deliver import Companions, write_adapter, write_merged
from flacuna_jax.huggingface.files.read import open_checkpoint
from flacuna_jax.huggingface.load import fingerprint, read_architecture
from flacuna_jax.huggingface.probe import probe_ids, stored_weights, streamed_logits
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.storage.checkpoint import Checkpointer

LORA = LoraConfig(rank=2, alpha=4.0)


def settings(base: Path, run: Path, lora: dict | None) -> RunConfig:
    data = {"sources": [{"path": "data.json"}]}
    return parse_config({"output_dir": str(run), "model": {"path": str(base)}, "lora": lora, "data": data})


def random_params(config: LlamaConfig, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {p: rng.standard_normal(s).astype(np.float32) * 0.1 for p, s in ModelSpec(config, LORA).lora_shapes.items()}


@pytest.fixture
def config(story_llama: Path) -> LlamaConfig:
    return read_architecture(story_llama)


@pytest.fixture
def run(story_llama: Path, config: LlamaConfig, tmp_path: Path) -> Path:
    """A finished run: its config, an adapter, and checkpoints of steps 5 and 10."""
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.yaml").write_text(settings(story_llama, path, LORA.model_dump(mode="json")).to_yaml())
    write_adapter(
        path / "adapter", Adapter(ModelSpec(config, LORA), random_params(config, 10), "base"), config, trained=True
    )
    base = fingerprint(open_checkpoint(story_llama), config)
    with Checkpointer(path, keep=3, asynchronous=False) as checkpointer:
        for step in (5, 10):
            params = {name: jnp.asarray(value) for name, value in random_params(config, step).items()}
            meta = {"fingerprints": {"base": base}}
            checkpointer.save(step, params, optax.adamw(1e-3).init(params), meta)
    return path


@pytest.mark.parametrize(("options", "seed"), [([], 10), (["--step", "5"], 5)], ids=["final", "step 5"])
def test_an_adapter(options: list[str], seed: int, run: Path, config: LlamaConfig, tmp_path: Path) -> None:
    arguments = [str(run), str(tmp_path / "out"), "--format", "adapter", "--base-name", "org/name", *options]
    assert run_verb(export.main, arguments) == 0
    found = read_adapter(tmp_path / "out", config)
    assert (found.lora, found.base_name) == (LORA, "org/name")
    for path, value in random_params(config, seed).items():
        np.testing.assert_array_equal(found.params[path], value)


def test_an_unfinished_run_gives_its_newest_checkpoint(run: Path, config: LlamaConfig, tmp_path: Path) -> None:
    (run / "adapter").rename(run / "elsewhere")
    assert run_verb(export.main, [str(run), str(tmp_path / "out"), "--format", "adapter"]) == 0
    expected = random_params(config, 10)
    found = read_adapter(tmp_path / "out", config)
    assert all(np.array_equal(found.params[path], value) for path, value in expected.items())


def test_a_merged_model(
    run: Path, config: LlamaConfig, story_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run_verb(export.main, [str(run), str(out), "--format", "merged", "--shard-bytes", "1000000"]) == 0
    assert "verified; rounding shifts logits by at most" in capsys.readouterr().out
    ids, adapter = probe_ids(config), Adapter(ModelSpec(config, LORA), random_params(config, 10))
    expected = streamed_logits(stored_weights(open_checkpoint(story_llama), config), config, ids, adapter)
    found = streamed_logits(stored_weights(open_checkpoint(out), config), config, ids, None)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert (out / "model.safetensors.index.json").is_file()
    assert "USER:" in (out / "tokenizer_config.json").read_text()


def test_a_model_without_an_adapter_is_written_unchanged(story_llama: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(story_llama), "--format", "merged", "--golden-tokens", "0"]
    assert run_verb(export.main, [str(tmp_path / "out"), *arguments]) == 0
    found, given = open_checkpoint(tmp_path / "out"), open_checkpoint(story_llama)
    layers = [name for name in found if "layers" in name]
    assert layers
    assert all(found.dtype(name) == given.dtype(name) for name in layers)
    assert all(np.array_equal(found.read(name), given.read(name)) for name in layers)


def test_a_base_that_was_moved(run: Path, story_llama: Path, tmp_path: Path) -> None:
    """The tokenizer is taken from it, too."""
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(story_llama), str(tmp_path / "before")))
    arguments = ["--base", str(story_llama), "--format", "merged", "--golden-tokens", "0"]
    assert run_verb(export.main, [str(run), str(tmp_path / "out"), *arguments]) == 0
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()


def test_any_adapter_is_merged_into_any_checkpoint(
    run: Path, story_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the run's settings, to the same weights as with them."""
    assert run_verb(export.main, [str(run), str(tmp_path / "of_run"), "--format", "merged"]) == 0
    adapter = tmp_path / "downloaded"
    (run / "adapter").rename(adapter)
    arguments = ["--adapter", str(adapter), "--model", str(story_llama), "--format", "merged"]
    assert run_verb(export.main, [str(tmp_path / "out"), *arguments]) == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("of_run", "out")]
    assert weights[0] == weights[1]
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()
    assert "read back and verified" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["OUT", "--format", "merged"], "give a run to export, or --model DIR to write any model"),
        (["OUT", "--format", "adapter", "--adapter", "A", "--model", "M"], "--format adapter needs a run"),
        (
            ["OUT", "--format", "merged", "--adapter", "A", "--model", "M", "--step", "5"],
            "--step is an option for a run",
        ),
        (["RUN", "OUT", "--format", "merged", "--adapter", "A"], "--adapter and --model replace RUN"),
    ],
)
def test_a_merge_without_a_run_needs_adapter_and_model(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    given = [{"OUT": str(tmp_path / "out"), "RUN": str(run)}.get(word, word) for word in arguments]
    assert run_verb(export.main, given) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("tick", "announced"), [(60.0, True), (0.01, False)])
def test_golden_prompts_that_take_minutes_are_announced(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tick: float,
    announced: bool,
) -> None:
    """With a clock that advances by a fixed number of seconds at each reading."""
    ticks = itertools.count(step=tick)
    monkeypatch.setattr(deliver, "time", types.SimpleNamespace(monotonic=lambda: next(ticks)))
    arguments = [str(run), str(tmp_path / "out"), "--format", "merged", "--golden-tokens", "3"]
    assert run_verb(export.main, arguments) == 0
    message = "answering golden prompts takes up to 3 min; --golden-tokens 0"
    assert (message in capsys.readouterr().out) is announced


def test_a_run_of_all_weights(story_llama: Path, config: LlamaConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(settings(story_llama, run, None).to_yaml())
    write_merged(run / "model", open_checkpoint(story_llama), config, None, Companions(story_llama, None, {}))
    assert run_verb(export.main, [str(run), str(tmp_path / "out"), "--format", "merged", "--dtype", "bfloat16"]) == 0
    reader = open_checkpoint(tmp_path / "out")
    assert {reader.dtype(name).name for name in reader} == {"bfloat16"}
    assert run_verb(export.main, [str(run), str(tmp_path / "other"), "--format", "adapter"]) == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--format", "adapter", "--step", "7"], "no checkpoint of step 7; available steps are 5, 10"),
        (["--format", "adapter", "--dtype", "float16"], "float32 or bfloat16"),
        (["--format", "merged", "--base", "nowhere"], "'nowhere' does not exist here"),
    ],
)
def test_bad_arguments_exit_2_and_write_nothing(
    arguments: list[str], says: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_verb(export.main, [str(run), str(tmp_path / "out"), *arguments]) == 2
    assert says in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_another_base_is_an_error(
    run: Path, story_llama: Path, config: LlamaConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    adapter = Adapter(ModelSpec(config, LORA), random_params(config, 3))
    write_merged(other, open_checkpoint(story_llama), config, adapter, Companions(story_llama, None, {}))
    arguments = [str(run), str(tmp_path / "out"), "--format", "adapter", "--step", "5", "--base", str(other)]
    assert run_verb(export.main, arguments) == 2
    assert "is not the base that" in capsys.readouterr().err


def test_a_directory_that_is_not_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb(export.main, [str(tmp_path), str(tmp_path / "out"), "--format", "adapter"]) == 2
    assert "has no config.yaml" in capsys.readouterr().err


def test_the_card_has_settings_course_and_results(run: Path, tmp_path: Path) -> None:
    steps = [{"step": 1, "loss": 3.25}, {"step": 8, "note": "no loss"}, {"step": 40, "loss": 1.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in steps))
    outcomes = tuple(Outcome(str(i), "all", {"accuracy": float(i % 2)}, {}) for i in range(4))
    result = TaskResult("mmlu", 5, "tuned", outcomes, "micro", 4)
    summary = {"problems": 4, "complete": True, "accuracy": {"mean": 50.0, "interval": [15.0, 85.0], "groups": {}}}
    write_result(result, run / "evaluation" / "tuned" / "mmlu-5shot.json", summary)
    harness = {
        "results": {
            "arc_easy": {"alias": "arc_easy", "acc,none": 0.625, "acc_stderr,none": 0.171, "sample_len": 8},
            "gsm8k": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": "N/A"},
        },
        "n-shot": {"arc_easy": 0},
        "n-samples": {"arc_easy": {"original": 2376, "effective": 8}},
    }
    (run / "evaluation" / "tuned" / "lm_eval.json").write_text(json.dumps(harness))
    for form in ("adapter", "merged"):
        arguments = [str(run), str(tmp_path / form), "--format", form, "--golden-tokens", "0"]
        assert run_verb(export.main, arguments) == 0
        card = (tmp_path / form / "README.md").read_text()
        assert "- data: data.json" in card
        assert "- training loss: 3.2500 → 1.5000" in card
        assert "| mmlu, 5 shots | accuracy | 50.00 [15.00, 85.00] | 4 |" in card
        assert "| arc_easy, 0 shots, lm_eval | acc | 0.6250 ± 0.1710 | 8 |" in card
        assert "| gsm8k, lm_eval | exact_match (strict-match) | 0.2500 |  |" in card
        assert "sample_len" not in card
    assert not (tmp_path / "merged" / "golden_prompts.json").exists()
    elsewhere = [str(run), str(tmp_path / "x"), "--format", "adapter", "--results", str(tmp_path)]
    assert run_verb(export.main, elsewhere) == 2
