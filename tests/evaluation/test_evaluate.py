"""The verb end to end on the small model: files, resumption, comparisons, messages."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flacuna_jax import evaluate
from flacuna_jax.cli import run_verb
from flacuna_jax.evaluation import impact
from flacuna_jax.evaluation.registry import BENCHMARKS
from flacuna_jax.evaluation.settings import EXECUTING_CODE, IMPACT_PROMPT, IN_TEMPLATE, SETTINGS


@pytest.fixture(scope="module")
def data(test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two MMLU subjects (with validation rows as the test set) and the available data of other benchmarks."""
    directory = tmp_path_factory.mktemp("data")
    for subject in ("anatomy", "astronomy"):
        for source, target in (("dev", "dev"), ("val", "test")):
            (directory / "mmlu" / target).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(
                test_data / "mmlu" / "data" / source / f"{subject}_{source}.csv",
                directory / "mmlu" / target / f"{subject}_{target}.csv",
            )
    for name in ("crass", "humaneval", "vicuna_eval_questions"):
        (directory / name).symlink_to(test_data / name)
    return directory


def _evaluate(*arguments: object) -> int:
    return run_verb(evaluate.main, [str(argument) for argument in arguments])


def test_two_models_side_by_side(
    story_llama: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(story_llama, other, copy_function=shutil.copyfile)
    common = ("--model", story_llama, "--data", data, "--dtype", "float32", "--output", tmp_path / "out", "--limit", 3)
    assert _evaluate(*common, "--tasks", "mmlu:0,crass:0", "--compare", other, "--name", "ours") == 0
    printed = capsys.readouterr().out
    assert "| ours − other |" in printed
    assert "Flacuna 13B (published)" in printed
    assert "DROP number is held-in" in printed
    assert (tmp_path / "out" / "tables.md").read_text() in printed
    result = json.loads((tmp_path / "out" / "ours" / "mmlu-0shot.json").read_text())
    assert result["summary"]["problems"] == 6
    assert set(result["summary"]["faithful"]["categories"]) == {"STEM", "other (business, health, misc.)"}
    assert result["outcomes"][0]["record"]["prompt"].startswith("The following are multiple choice")
    differences = json.loads((tmp_path / "out" / "differences.json").read_text())[0]["differences"]
    assert all(d["mean"] == 0 and d["p_value"] == 1 for d in differences)  # the same weights under two names
    drawn = {path.name for path in (tmp_path / "out").glob("*.svg")}
    assert drawn == {"zero-shot-faithful.svg", "zero-shot-corrected.svg"}


def test_mmlu_on_the_validation_questions(story_llama: Path, test_data: Path, tmp_path: Path) -> None:
    common = ("--model", story_llama, "--data", test_data, "--output", tmp_path, "--tasks", "mmlu:0", "--limit", 1)
    assert _evaluate(*common, "--mmlu-split", "val", "--dtype", "float32", "--name", "tiny") == 0
    result = json.loads((tmp_path / "tiny" / "mmlu-0shot.json").read_text())
    assert "scored on the val split" in result["notes"]
    assert result["summary"]["problems"] == 57
    assert set(result["summary"]) >= {"faithful", "corrected", "letter"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "mmlo"], "unknown benchmark 'mmlo'"),
        (["--tasks", "crass", "--output", "/dev/null/x"], "--output /dev/null/x cannot be created"),
        (["--tasks", "mmlu:x"], "a number of shots after the colon"),
        (["--tasks", "humaneval"], "--allow-code-execution"),
        (["--tasks", "bbh"], "has no BBH task"),
        (["--tasks", "crass", "--compare", "base"], "the model has no adapter"),
        (["--tasks", "impact", "--judge-url", "http://localhost:1"], "--judge-url needs --judge-model"),
        (["--tasks", "impact", "--judge-url", "localhost", "--judge-model", "m"], "expected the base of the API"),
        (["--tasks", "impact", "--impact-temperature", "-1"], "temperature is -1.0"),
    ],
)
def test_mistakes_are_reported_before_a_model_is_loaded(
    arguments: list[str], message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _evaluate("--model", tmp_path / "nowhere", "--data", data, "--output", tmp_path / "o", *arguments) == 2
    assert message in capsys.readouterr().err


def test_results_are_written_before_a_later_task_fails(
    story_llama: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Refuses(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_error(401)

    common = ("--model", story_llama, "--data", data, "--limit", 1, "--output", tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        judge = ("--judge-url", f"http://127.0.0.1:{server.server_port}/v1", "--judge-model", "j")
        assert _evaluate(*common, "--tasks", "crass:0,impact", *judge) == 2
        server.shutdown()
    assert "rejects it (HTTP 401)" in capsys.readouterr().err
    assert (tmp_path / story_llama.name / "crass-0shot.json").is_file()


@pytest.mark.parametrize("option", ["--limit=0", "--limit=x", "--shots=-1", "--rows=1.5"])
def test_options_that_are_not_numbers_are_errors(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        _evaluate("--model", "m", "--data", "d", "--tasks", "crass", option)
    assert "is not" in capsys.readouterr().err


def test_a_missing_model_is_an_error(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _evaluate("--model", tmp_path / "no", "--data", data, "--tasks", "crass", "--output", tmp_path / "o") == 2
    assert "is not a directory; give a checkpoint directory" in capsys.readouterr().err


def test_options_name_the_benchmarks_that_they_are_for() -> None:
    assert tuple(benchmark.name for benchmark in BENCHMARKS if benchmark.executes_code) == EXECUTING_CODE
    assert tuple(benchmark.name for benchmark in BENCHMARKS if benchmark.uses_template) == IN_TEMPLATE
    assert {name for setting in SETTINGS for name in setting.readers} <= {benchmark.name for benchmark in BENCHMARKS}
    assert IMPACT_PROMPT.choices == tuple(impact.STYLES)
