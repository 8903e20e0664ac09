"""Evaluation during training: its numbers, interruption, early stopping, and the best checkpoint."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from flacuna_jax.config.run import EvaluationConfig
from flacuna_jax.run.start import chosen_state
from flacuna_jax.run.watch import warn_if_worse
from flacuna_jax.storage.checkpoint import list_checkpoints, restore_adapters
from flacuna_jax.storage.run_directory import RunDirectory
from flacuna_jax.training.history import History
from flacuna_jax.training.state import TrainState
from tests.small_run import records, write_run
from tests.test_end_to_end import adapter_bytes, run, run_until
from tests.test_multihost import finish, start_hosts

pytestmark = pytest.mark.usefixtures("compiled_once")

TIMED = ("tokens_per_second", "supervised_tokens_per_second", "seconds_per_step", "peak_memory_bytes", "mfu")


def write_measured_run(directory: Path, **evaluation) -> Path:
    """80 records of two sources, a fifth held out."""
    settings = {"every_steps": 4, "fraction": 0.2, "samples": 2, "sample_tokens": 6, "prompts": ["reverse red cat"]}
    config = write_run(
        directory,
        evaluation={**settings, **evaluation},
        checkpoint={"every_steps": 5, "keep": 2, "keep_best": 1},
        lora={"rank": 2, "dropout": 0.05, "targets": ["q_proj", "v_proj"]},
    )
    made = [{**record, "source": ("left", "right")[i % 2]} for i, record in enumerate(records(80))]
    (directory / "data.json").write_text(json.dumps(made))
    return config


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluations(directory: Path) -> dict[int, dict]:
    return {r["step"]: r for r in lines(directory / "metrics.jsonl") if r.get("kind") == "evaluation"}


def untimed(directory: Path) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in TIMED} for record in lines(directory / "metrics.jsonl")]


@pytest.fixture(scope="module")
def measured(tmp_path_factory, compiled_once) -> Path:
    directory = tmp_path_factory.mktemp("measured")
    assert run(write_measured_run(directory)) == 0
    return directory


def test_evaluation_ignores_the_schedule_of_training(measured, tmp_path):
    """Held-out rows fill fewer steps than warm-up and decay need; only the run itself must be long enough for them."""
    schedule = ["--training.schedule=warmup_stable_decay", "--training.warmup_steps=3", "--training.decay_steps=9"]
    assert run(measured / "config.yaml", f"--output_dir={tmp_path / 'run'}", *schedule) == 0
    assert evaluations(tmp_path / "run").keys() == evaluations(measured / "run").keys()


def test_evaluates_before_during_and_after_training(measured):
    found = evaluations(measured / "run")
    last = max(found)
    assert list(found) == sorted({0, *range(4, last + 1, 4), last})
    assert found[last]["eval/loss"] < found[0]["eval/loss"] - 0.1
    for record in found.values():
        assert "loss" not in record, "only training records have a loss"
        tokens = [record[f"eval/tokens/{name}"] for name in ("left", "right")]
        assert sum(tokens) == record["eval/tokens"]
        for key in ("eval/loss", "eval/token_accuracy"):
            by_source = [record[f"{key}/{name}"] for name in ("left", "right")]  # every token weighs the same
            assert record[key] == pytest.approx(np.average(by_source, weights=tokens), abs=1e-6), (
                "tokens weigh the same"
            )
        assert record["eval/perplexity"] == pytest.approx(np.exp(record["eval/loss"]))


def test_sample_answers_are_written_with_the_expected_answers(measured):
    found = lines(measured / "run" / "samples.jsonl")
    assert len(found) == 3 * len(evaluations(measured / "run"))
    asked = {line["id"]: line for line in found if line["step"] == 0}
    assert asked["evaluation.prompts.0"]["question"] == "reverse red cat"
    for id, line in asked.items():
        if id != "evaluation.prompts.0":
            assert line["question"].startswith("reverse "), "without the template's words"
            words = line["question"].split()[1:]
            assert line["expected"] == " ".join(words[::-1])
    page = (measured / "run" / "report.html").read_text()
    assert "Held-out loss" in page
    assert "Answers, before and after" in page


def test_the_best_checkpoint_is_kept(measured):
    found = evaluations(measured / "run")
    best = min((step for step in found if step), key=lambda step: found[step]["eval/loss"])
    assert best in list_checkpoints(measured / "run")
    assert len(list_checkpoints(measured / "run")) <= 3


@pytest.mark.parametrize("at", [pytest.param(4, marks=pytest.mark.slow), 9])
def test_an_interrupted_run_gives_the_same_evaluations_and_adapter(measured, tmp_path, at):
    out = f"--output_dir={tmp_path / 'run'}"
    run_until(at, measured / "config.yaml", out)
    assert run(measured / "config.yaml", out) == 0
    assert untimed(tmp_path / "run") == untimed(measured / "run")
    assert lines(tmp_path / "run" / "samples.jsonl") == lines(measured / "run" / "samples.jsonl")
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(measured / "run")
    assert list_checkpoints(tmp_path / "run") == list_checkpoints(measured / "run")


@pytest.mark.parametrize(
    ("metric", "values", "says"),
    [
        ("eval/loss", (2.0, 3.0, 2.5), "eval/loss was 2 before the first step and is 2.5 at its best"),
        ("eval/loss", (2.0, 3.0, 1.9), None),
        ("tasks/mmlu:5/faithful", (30.0, 10.0, 20.0), "was 30 before the first step and is 20 at its best"),
        ("tasks/mmlu:5/faithful", (30.0, 10.0, 30.0), None),
        ("tasks/mmlu:5/faithful", (None, 10.0, 30.0), None),
    ],
)
def test_a_warning_if_no_evaluation_is_as_good_as_the_one_before_training(tmp_path, metric, values, says):
    settings = EvaluationConfig(fraction=0.1, metric=metric)
    history = History(settings.lower_is_better)
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step, value in zip((0, 5, 10), values, strict=True):
            file.write(json.dumps({"step": step, "kind": "evaluation"} | ({metric: value} if value else {})) + "\n")
            history.add(step, value if step else None)
    said: list[str] = []
    warn_if_worse(RunDirectory(tmp_path, str(tmp_path)), settings, history, said.append)
    assert [says in line for line in said] == [True] * bool(says)


def test_a_run_that_gets_worse_stops_and_delivers_its_best(measured, tmp_path, capsys):
    """A learning rate of 10 ruins any model; the best checkpoint is an early one, and a second start does not train."""
    overrides = [
        f"--output_dir={tmp_path / 'run'}",
        "--training.learning_rate=10.0",
        "--training.epochs=20",
        "--evaluation.every_steps=2",
        "--evaluation.patience=2",
        "--evaluation.deliver=best",
        "--evaluation.samples=0",
        "--evaluation.prompts=[]",
    ]
    assert run(measured / "config.yaml", *overrides) == 0
    found = evaluations(tmp_path / "run")
    best = min((step for step in found if step), key=lambda step: found[step]["eval/loss"])
    assert max(found) == best + 4
    said = capsys.readouterr().out
    assert "stopped early: no new best in 2 evaluations" in said
    assert f"delivering step {best}, the best by eval/loss" in said
    arrays, _ = restore_adapters(tmp_path / "run", best)
    delivered = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    np.testing.assert_array_equal(
        delivered["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"], arrays["layers/q_proj/lora_a"][0]
    )
    before = adapter_bytes(tmp_path / "run"), untimed(tmp_path / "run")
    assert run(measured / "config.yaml", *overrides) == 0
    assert (adapter_bytes(tmp_path / "run"), untimed(tmp_path / "run")) == before


def test_evaluation_sources_and_the_warning_about_questions_in_the_training_data(measured, tmp_path, capsys):
    made = [*records(80)[:3], *records(5, seed=9)]
    (tmp_path / "e.json").write_text(json.dumps(made))
    overrides = ["--evaluation.fraction=null", f"--evaluation.sources=[{{path: {tmp_path / 'e.json'}}}]"]
    out = f"--output_dir={tmp_path / 'run'}"
    assert run(measured / "config.yaml", out, *overrides, "--training.max_steps=1") == 0
    said = capsys.readouterr().out
    assert "held out   8 examples" in said
    assert "of 8 questions in evaluation.sources are also in the training data" in said
    assert "80 examples in" in said, "nothing is held out of training"


def test_benchmarks_run_during_training(measured, tmp_path, test_data):
    overrides = [
        f"--output_dir={tmp_path / 'run'}",
        f"--evaluation.tasks={{names: ['crass:0'], data: {test_data}, limit: 2}}",
        "--evaluation.metric=tasks/crass:0/faithful",
        "--training.max_steps=4",
    ]
    assert run(measured / "config.yaml", *overrides) == 0
    found = evaluations(tmp_path / "run")
    assert [0 <= record["tasks/crass:0/faithful"] <= 1 for record in found.values()] == [True, True]
    assert "crass:0/faithful" in (tmp_path / "run" / "report.html").read_text()


@pytest.fixture(scope="module")
def harness_tasks(tmp_path_factory) -> Path:
    """Two tasks of lm-evaluation-harness on local records: multiple choice, and generation."""
    pytest.importorskip("lm_eval")
    directory = tmp_path_factory.mktemp("tasks")
    rows = [
        {"q": record["conversations"][0]["value"], "a": record["conversations"][1]["value"], "b": "blue cat house"}
        for record in records(6, seed=5)
    ]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {directory / 'rows.jsonl'}}}}}\ntest_split: test\n"
    )
    (directory / "choice.yaml").write_text(
        common
        + """
task: which_reversed
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{[a, b]}}"
doc_to_target: 0
metric_list: [{metric: acc}]
"""
    )
    (directory / "answer.yaml").write_text(
        common
        + """
task: say_reversed
output_type: generate_until
doc_to_text: "{{q}}"
doc_to_target: "{{a}}"
generation_kwargs: {until: ["!"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
"""
    )
    return directory


def with_harness(tasks: Path, out: Path) -> list[str]:
    names = "names: [which_reversed, say_reversed], protocol: lm_eval"
    return [
        f"--output_dir={out}",
        f"--evaluation.tasks={{{names}, data: {tasks}, limit: 4, every_steps: 4}}",
        "--evaluation.metric=tasks/which_reversed/acc",
        "--training.max_steps=6",
    ]


def test_harness_tasks_run_during_training(measured, tmp_path, harness_tasks):
    """lm-evaluation-harness itself evaluates the model during training, with the template of training."""
    assert run(measured / "config.yaml", *with_harness(harness_tasks, tmp_path / "run")) == 0
    found = evaluations(tmp_path / "run")
    assert list(found) == [0, 4, 6]
    for step in (0, 4):
        assert found[step]["tasks/which_reversed/acc"] in (0, 0.25, 0.5, 0.75, 1)
        assert 0 <= found[step]["tasks/say_reversed/exact_match"] <= 1
    assert not any(name.startswith("tasks/") for name in found[6]), "at its own interval only"
    assert 4 in list_checkpoints(tmp_path / "run"), "the best by that metric"
    assert "which_reversed/acc" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_two_hosts_get_the_same_harness_results_as_one(measured, tmp_path, harness_tasks):
    assert run(measured / "config.yaml", *with_harness(harness_tasks, tmp_path / "one")) == 0
    results = finish(
        start_hosts(measured / "config.yaml", *with_harness(harness_tasks, tmp_path / "two"), "--mesh.fsdp=4")
    )
    assert [status for status, _ in results] == [0, 0], results
    one, two = (evaluations(tmp_path / name) for name in ("one", "two"))
    assert {step: record.keys() for step, record in one.items()} == {s: record.keys() for s, record in two.items()}
    assert two[0]["tasks/which_reversed/acc"] == one[0]["tasks/which_reversed/acc"]
    assert lines(tmp_path / "two" / "samples.jsonl") == lines(tmp_path / "one" / "samples.jsonl")


MISTAKES = {
    "no such number": (["--evaluation.metric=eval/los"], "did you mean eval/loss?"),
    "holds out nothing": (["--evaluation.fraction=1e-9"], "evaluation.fraction"),
    "no such benchmark": (["--evaluation.tasks={names: [mlu], data: .}"], "mmlu"),
    "no tokens left for answers": (["--evaluation.sample_tokens=250"], "evaluation.prompts.0"),
    "no such records": (["--evaluation.fraction=null", "--evaluation.sources=[{path: nowhere.json}]"], "nowhere.json"),
}


@pytest.mark.parametrize(("overrides", "hint"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistakes_end_with_status_2(measured, tmp_path, capsys, overrides, hint):
    assert run(measured / "config.yaml", f"--output_dir={tmp_path / 'run'}", *overrides) == 2
    said = capsys.readouterr().err
    assert hint in said
    assert "Traceback" not in said


def test_another_held_out_fraction_cannot_be_resumed(measured, tmp_path, capsys):
    shutil.copytree(measured / "run", tmp_path / "run")
    out = f"--output_dir={tmp_path / 'run'}"
    assert run(measured / "config.yaml", out, "--evaluation.fraction=0.3") == 2
    assert "held_out_fraction: 0.2 in the checkpoint, 0.3 now" in capsys.readouterr().err
    assert run(measured / "config.yaml", out, "--evaluation.patience=50", "--evaluation.samples=0") == 0


@pytest.mark.slow
def test_two_hosts_get_the_same_evaluation_as_one(measured, tmp_path):
    out = tmp_path / "run"
    results = finish(start_hosts(measured / "config.yaml", f"--output_dir={out}", "--mesh.fsdp=4"))
    assert [status for status, _ in results] == [0, 0], results
    expected, found = evaluations(measured / "run"), evaluations(out)
    assert list(found) == list(expected)
    for step, record in found.items():
        # Rows of a step are on other devices, so sums are added in another order.
        assert record["eval/loss"] == pytest.approx(expected[step]["eval/loss"], abs=1e-4)
        assert record["eval/tokens"] == expected[step]["eval/tokens"]
    samples = [lines(directory / "samples.jsonl") for directory in (measured / "run", out)]
    assert samples[1] == samples[0], "greedy answers, from weights that differ by rounding"


def test_the_delivery_names_the_best_step_if_its_checkpoint_is_gone():
    """With checkpoint.keep_best: 0, the checkpoint of the best step may have been deleted."""
    history = History(lower_is_better=True, values={4: 0.25, 8: 0.5, 12: 0.75})
    setup = SimpleNamespace(config=SimpleNamespace(evaluation=SimpleNamespace(deliver="best", metric="eval/loss")))
    said: list[str] = []
    last = TrainState(8, {}, None)
    assert chosen_state(setup, SimpleNamespace(steps=lambda: [8, 12]), history, last, said.append) is last
    assert said == ["delivering step 8, the best by eval/loss (0.5) of the remaining ones; the best was step 4 (0.25)"]
