"""Stops around an evaluation inside a run: it is made once, and with the same numbers."""

import json
import os
import signal
from pathlib import Path

import pytest

from flacuna_jax.cli import EXIT_STOPPED
from flacuna_jax.storage.checkpoint import list_checkpoints
from flacuna_jax.training.evaluator import HeldOut
from tests.faults.runs import EVALUATED, assert_same_run
from tests.test_end_to_end import Stopped, at_step, losses, run, terminate

pytestmark = pytest.mark.usefixtures("compiled_once", "signals_of_a_terminal")


@pytest.fixture(scope="module")
def evaluated(undisturbed, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "run"
    assert run(undisturbed / "config.yaml", f"--output_dir={out}", EVALUATED) == 0
    return out


def evaluations(directory: Path) -> list[tuple]:
    """Metrics and sample answers, in the order of the files."""
    measured = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    answered = map(json.loads, (directory / "samples.jsonl").read_text().splitlines())
    losses_by_step = [(record["step"], record["eval/loss"]) for record in measured if "eval/loss" in record]
    return [*losses_by_step, *((record["step"], record["answer"]) for record in answered)]


def assert_same_evaluated_run(directory: Path, expected: Path) -> None:
    assert_same_run(directory, expected)
    assert evaluations(directory) == evaluations(expected)


@pytest.mark.parametrize("at", ["the last step", pytest.param("a step that is due", marks=pytest.mark.slow)])
def test_an_evaluation_skipped_by_a_stop_is_done_by_the_next_start(undisturbed, evaluated, tmp_path, at):
    out, step = tmp_path / "run", max(losses(evaluated)) if at == "the last step" else 10
    arguments = undisturbed / "config.yaml", f"--output_dir={out}", EVALUATED
    assert run(*arguments, hooks=at_step(step, terminate)) == EXIT_STOPPED
    assert step not in dict(evaluations(out))
    assert run(*arguments) == 0
    assert_same_evaluated_run(out, evaluated)


def test_an_evaluation_after_the_last_checkpoint_is_repeated_once(
    undisturbed, evaluated, tmp_path, monkeypatch, capsys
):
    """Stopped before it, stopped again during it, killed directly after it; a kill is an exception here, which saves
    nothing."""
    out = tmp_path / "run"
    arguments = undisturbed / "config.yaml", f"--output_dir={out}", EVALUATED
    assert run(*arguments, hooks=at_step(10, terminate)) == EXIT_STOPPED
    measure = HeldOut.measure

    def stop_in_it(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        return measure(*given)

    with monkeypatch.context() as patched:
        patched.setattr(HeldOut, "measure", stop_in_it)
        assert run(*arguments) == EXIT_STOPPED
    assert list_checkpoints(out)[-1] == 10, "no step is done before the pending evaluation"

    def killed():
        raise Stopped

    with pytest.raises(Stopped):
        run(*arguments, hooks=at_step(11, killed))
    assert 10 in dict(evaluations(out))
    assert run(*arguments) == 0
    assert "removed records newer than the checkpoint, after step 10: 2" in capsys.readouterr().out
    assert_same_evaluated_run(out, evaluated)
