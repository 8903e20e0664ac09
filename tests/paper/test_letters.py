"""The letters of MMLU, scored by lm-evaluation-harness itself."""

import json
from pathlib import Path

import pytest

from flacuna_jax.cli import run_verb
from flacuna_jax.evaluate import main as evaluate
from flacuna_jax.evaluation.results import Outcome, TaskResult, write_result
from flacuna_jax.paper import letters

PROMPTS = ["Lily had a dog.\nA. yes\nB. no\nC. red\nD. one\nAnswer:", "The sun was\nA. hot\nB. no\nC. a\nD. b\nAnswer:"]


def test_the_harness_answers_the_prompts_of_a_result(story_llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the eval extra")
    outcomes = tuple(
        Outcome(str(i), "g", {"faithful": 0.0}, {"prompt": prompt, "label": letter, "prediction": ""})
        for i, (prompt, letter) in enumerate(zip(PROMPTS * 2, "ABCD", strict=True))
    )
    write_result(TaskResult("mmlu", 0, "base", outcomes, "micro", 4), tmp_path / "mmlu-0shot.json", {})
    directory = tmp_path / "letters"
    letters.write_task(tmp_path / "mmlu-0shot.json", directory)
    command = ["--protocol", "lm_eval", "--model", str(story_llama), "--name", "base", "--tasks", letters.TASK]
    assert run_verb(evaluate, [*command, "--data", str(directory), "--output", str(directory)]) == 0
    result = letters.read_letters(directory / "base" / letters.FILE, "base")
    assert [outcome.id for outcome in result.outcomes] == ["0", "1", "2", "3"]
    whole = json.loads((directory / "base" / letters.FILE).read_text())
    assert result.mean(letters.SCORE) == pytest.approx(100 * whole["results"][letters.TASK]["acc,none"])
    right = [outcome.record["prediction"] == letter for outcome, letter in zip(result.outcomes, "ABCD", strict=True)]
    assert right == [outcome.scores[letters.SCORE] == 1 for outcome in result.outcomes]
    asked = [sample["arguments"] for sample in whole["samples"][letters.TASK]]
    assert "Lily had a dog" in str(asked[0])
    assert len(asked[0]) == 4
