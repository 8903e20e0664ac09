"""Whole runs of preference tuning: what they log, references, kill and resume, wrong inputs."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from flacuna_jax import UserError, load_config, open_run, read_data
from flacuna_jax.prepare import main as prepare
from flacuna_jax.run.reference import with_reference
from tests.small_run import WORDS, write_run
from tests.test_end_to_end import adapter_bytes, losses, run, run_until
from tests.test_multihost import finish, start_hosts

pytestmark = pytest.mark.usefixtures("compiled_once")

EVALUATED = {"every_steps": 4, "fraction": 0.2, "samples": 1, "sample_tokens": 4, "metric": "eval/rewards/accuracy"}


def pairs(count: int = 30) -> list[dict]:
    rng, made = random.Random(0), []
    for _ in range(count):
        words = rng.sample(WORDS, 3)
        made.append({"prompt": f"name {words[0]}", "chosen": " ".join(words), "rejected": " ".join(words[:2])})
    return made


def labelled() -> list[dict]:
    return [
        {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
        for pair in pairs()
        for name in ("chosen", "rejected")
    ]


def write_preferences(directory: Path, objective: dict, records: list[dict], **sections) -> Path:
    training = {"objective": objective, "epochs": 1, **sections.pop("training", {})}
    config = write_run(directory, training=training, **{"lora": {"dropout": 0.05}, **sections})
    (directory / "data.json").write_text(json.dumps(records))
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compiled_once) -> Path:
    directory = tmp_path_factory.mktemp("dpo")
    assert run(write_preferences(directory, {"name": "dpo"}, pairs(), evaluation=EVALUATED)) == 0
    return directory


def metrics(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_run_logs_rewards_by_name_in_training_and_evaluation(finished):
    names = {"rewards/chosen", "rewards/rejected", "rewards/margin", "rewards/accuracy", "logps/chosen", "kl"}
    records = metrics(finished / "run")
    steps = [record for record in records if "kind" not in record]
    evaluations = [record for record in records if record.get("kind") == "evaluation"]
    assert all(names <= step.keys() for step in steps)
    assert all({f"eval/{name}" for name in names} <= found.keys() for found in evaluations)
    assert steps[0]["loss"] == pytest.approx(np.log(2), abs=1e-6), "fresh adapters are their reference"
    assert evaluations[0]["eval/pairs"] > 1
    page = (finished / "run" / "report.html").read_text()
    assert "rewards/margin" in page
    assert "Held-out rewards/accuracy" in page
    assert "reward accuracy" in page


def test_an_interrupted_run_continues_to_the_same_bytes(finished, tmp_path):
    out = f"--output_dir={tmp_path / 'run'}"
    run_until(2, finished / "config.yaml", out)
    assert run(finished / "config.yaml", out) == 0
    assert losses(tmp_path / "run") == losses(finished / "run")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(finished / "run")


@pytest.mark.slow
def test_cached_log_probabilities_and_the_first_adapter_are_the_same_reference(finished, tmp_path):
    """Begun with an adapter, a run has the same losses with that adapter as reference, computed or cached."""
    begun = [f"--lora.init_from={finished / 'run' / 'adapter'}", "--lora.rank=2", "--evaluation=null"]
    curves = {}
    for name, reference in (("cached", "cached"), ("adapter", f"{{adapter: {finished / 'run' / 'adapter'}}}")):
        out = [f"--output_dir={tmp_path / name}", f"--training.objective.reference={reference}"]
        assert run(finished / "config.yaml", *begun, *out) == 0
        curves[name] = list(losses(tmp_path / name).values())
    assert curves["cached"][0] == pytest.approx(np.log(2), abs=0.02), "dropout alone separates the two"
    # Cached values were computed on other rows: rounding only.
    np.testing.assert_allclose(curves["cached"], curves["adapter"], atol=1e-5)


@pytest.mark.slow
def test_full_fine_tuning_caches_its_reference_and_resumes_to_the_same_bytes(finished, tmp_path):
    whole, broken = ([f"--output_dir={tmp_path / name}", "--lora=null", "--evaluation=null"] for name in ("a", "b"))
    rate = "--training.learning_rate=1e-4"
    assert run(finished / "config.yaml", *whole, rate) == 0
    run_until(3, finished / "config.yaml", *broken, rate)
    assert run(finished / "config.yaml", *broken, rate) == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a")[1] == pytest.approx(np.log(2), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["simpo", "orpo", "kto"])
def test_the_other_objectives_run_and_resume(name, tmp_path):
    records = labelled() if name == "kto" else pairs()
    evaluation = {**EVALUATED, "metric": "eval/loss"}
    config = write_preferences(tmp_path, {"name": name}, records, evaluation=evaluation)
    assert run(config) == 0
    run_until(2, config, f"--output_dir={tmp_path / 'other'}")
    assert run(config, f"--output_dir={tmp_path / 'other'}") == 0
    assert adapter_bytes(tmp_path / "other") == adapter_bytes(tmp_path / "run")
    last = metrics(tmp_path / "run")[-1]
    assert ("eval/examples" if name == "kto" else "eval/pairs") in last


def test_prepare_shows_both_answers(finished, tmp_path, capsys):
    prepare(["--config", str(finished / "config.yaml"), "--show", "1", "--cache", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "─ chosen\n" in shown
    assert "─ rejected\n" in shown
    first = pairs()[0]
    assert f"⟦{first['chosen']}" in shown.replace("⟦ ", "⟦")


@pytest.mark.parametrize(
    ("objective", "records", "message"),
    [
        (None, pairs(), r"line 1 .*a pair of a chosen and a rejected answer, which is for training.objective"),
        ({"name": "dpo"}, labelled(), "labelled good or bad, which is for .*name: kto.*; this run needs a pair"),
        ({"name": "kto"}, pairs(), "this run needs an answer that is labelled good or bad"),
        ({"name": "dpo"}, [{"prompt": "a", "completion": "b"}], "an answer without a preference, which is for instr"),
    ],
)
def test_records_of_another_kind_are_refused_by_line(objective, records, message, finished, tmp_path):
    shutil.copytree(finished / "tokenizer", tmp_path / "tokenizer")
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    overrides = [f"--data.sources=[{{path: {path}}}]", f"--training.objective={json.dumps(objective)}"]
    with pytest.raises(UserError, match=message):
        read_data(load_config(finished / "config.yaml", ["--evaluation=null", *overrides]), lambda _: None)


def test_a_reference_of_another_rank_or_base_is_refused(finished, tmp_path):
    adapter = finished / "run" / "adapter"
    overrides = [f"--output_dir={tmp_path / 'run'}", f"--training.objective.reference={{adapter: {adapter}}}"]
    config = load_config(finished / "config.yaml", [*overrides, "--lora.rank=3"])
    message = r"adapter in training.objective.reference.adapter .* has other settings"
    with pytest.raises(UserError, match=message), open_run(config, say=lambda _: None):
        pass
    larger = load_config(finished / "config.yaml", [*overrides, "--model.architecture.hidden_size=64"])
    with pytest.raises(UserError, match="belongs to another model"), open_run(larger, say=lambda _: None):
        pass
    begun = load_config(finished / "config.yaml", [overrides[0], f"--lora.init_from={adapter}", "--lora.rank=3"])
    message = r"adapter in lora.init_from .* has other settings"
    with pytest.raises(UserError, match=message), open_run(begun, say=lambda _: None):
        pass
    nowhere = load_config(finished / "config.yaml", [overrides[0], "--lora.init_from=nowhere"])
    message = "lora.init_from: nowhere has no adapter_config.json"
    with pytest.raises(UserError, match=message), open_run(nowhere, say=lambda _: None):
        pass
    assert not (tmp_path / "run").exists(), "a refused run leaves nothing"


def test_the_reference_is_computed_once(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("FLACUNA_CACHE", str(tmp_path / "cache"))
    overrides = [f"--output_dir={tmp_path / 'run'}", "--training.objective.reference=cached"]
    said: list[str] = []
    config = load_config(finished / "config.yaml", overrides)
    for _ in range(2):
        with open_run(config, say=said.append) as opened:
            values = opened.setup.store.reference
            assert with_reference(opened.setup, opened.base, opened.state, said.append).store.fingerprint
            assert values.shape == (len(opened.setup.store), 2)
    assert sum("computing log-probabilities" in line for line in said) == 2, "of training and of held-out pairs"


@pytest.mark.slow
def test_hosts_with_caches_of_their_own_agree_on_the_reference(finished, tmp_path):
    """The first host's cache decides for all; a host without the values must not compute them alone."""
    caches = [tmp_path / "cache0", tmp_path / "cache1"]
    overrides = ["--training.objective.reference=cached", "--evaluation=null", "--mesh={fsdp: 4}"]
    for name in ("first", "again"):
        out = f"--output_dir={tmp_path / name}"
        results = finish(start_hosts(finished / "config.yaml", *overrides, out, caches=caches))
        assert [status for status, _ in results] == [0, 0], results
        assert ("computing log-probabilities" in results[0][1]) == (name == "first")
    assert losses(tmp_path / "first") == losses(tmp_path / "again")
    assert not list(caches[1].glob("reference/*.npy"))
