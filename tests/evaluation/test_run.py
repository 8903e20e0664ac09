"""Whole benchmarks on scripted models with known scores."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from flacuna_jax.evaluation import bbh, drop, hhh, humaneval, impact, mmlu
from flacuna_jax.evaluation.cache import CachedModel, Store
from flacuna_jax.evaluation.hhh import run_hhh
from flacuna_jax.evaluation.impact import run_impact
from flacuna_jax.evaluation.labels import run_answers
from flacuna_jax.evaluation.programs import CodeTask, run_code
from flacuna_jax.evaluation.results import read_result, write_result
from flacuna_jax.generation.language_model import Generation, GenerationRequest
from tests.evaluation.models import Letters, Scripted
from tests.vocabularies import llama_template


def test_a_perfect_model_scores_100_and_a_model_that_always_answers_a_scores_the_share_of_a(test_data: Path) -> None:
    task = mmlu.load(test_data, 0, split="val")
    labels = {problem.faithful.prompt(0): problem.faithful.label for problem in task.problems}
    labels |= {problem.corrected.prompt(0): problem.corrected.label for problem in task.problems}
    knows = run_answers(task, Scripted(answer=lambda prompt: " " + labels[prompt]))
    assert knows.mean("faithful") == knows.mean("corrected") == 100
    says_a = run_answers(task, Scripted())
    share = sum(problem.faithful.label == "A" for problem in task.problems) / len(task.problems)
    assert says_a.mean("faithful") == pytest.approx(100 * share)
    assert not says_a.complete


def test_corrected_questions_are_asked_if_they_differ(test_data: Path, tmp_path: Path) -> None:
    task = mmlu.load(test_data, 0, split="val")
    model = Scripted()
    run_answers(task, CachedModel(model, Store(None)))  # type: ignore[arg-type]
    assert len(model.asked) == len({p.faithful.prompt(0) for p in task.problems}) + 2


def test_macro_average_weights_tasks_equally(test_data: Path) -> None:
    task = bbh.load(test_data, 3)
    labels = {p.faithful.prompt(3): p.faithful.label for p in task.problems if p.group == "boolean_expressions"}
    result = run_answers(task, Scripted(answer=lambda prompt: labels.get(prompt, "?")))
    assert result.by_group("faithful")["boolean_expressions"] == 100
    assert result.mean("faithful") == pytest.approx(100 / len(result.groups))


def test_labels_longer_than_the_answer_are_counted(test_data: Path) -> None:
    """The scripted model's tokens are characters; a DROP answer has at most eight tokens."""
    task = drop.load(test_data)
    long = sum(len(problem.faithful.label) > 8 for problem in task.problems)
    assert f"{long} labels are longer than 8 tokens" in run_answers(task, Scripted()).notes[-1]


def _hhh_model(preference: dict[str, float], bias_a: float) -> Scripted:
    """Prefers answers by a table, with a bias for the letter A."""

    def log_probability(context: str, letter: str) -> float:
        a = context.split("\n\nA. ")[1].split("\n\nB. ")[0]
        b = context.split("\n\nB. ")[1].split("\n\nConsidering the query")[0]
        return preference[a] + bias_a if letter == "A" else preference[b]

    return Scripted(log_probability=log_probability)


@pytest.mark.parametrize("protocol", ["paper", "current"])
def test_hhh_is_independent_of_a_bias_for_a_letter(protocol: hhh.Protocol) -> None:
    comparisons = [hhh.Comparison(f"harmless/{i}", "harmless", f"q{i}", f"good{i}", f"bad{i}") for i in range(20)]
    taste = {f"good{i}": 1.0 if i < 15 else -1.0 for i in range(20)} | {f"bad{i}": 0.0 for i in range(20)}
    result = run_hhh(comparisons, _hhh_model(taste, bias_a=50.0), protocol, repetitions=2)
    assert result.mean("faithful") == result.mean("corrected") == 75
    (first, *_) = result.outcomes[0].record["prompts"]
    good_a = first["good"] == "A"
    after_measured = [51.0, 0.0] if good_a else [50.0, 1.0]
    after_reference = [50.0, 0.0] if protocol == "paper" else [50.0, 1.0]
    assert first["faithful"] == first["corrected"] == after_measured + after_reference


def test_hhh_has_a_note_if_a_and_b_have_the_same_first_token() -> None:
    """As with a tokenizer that adds a separate space token before unknown letters."""

    class Spaced(Letters):
        def encode(self, text: str, first: bool = True) -> list[int]:
            return super().encode(f" {text}")

    comparison = hhh.Comparison("harmless/0", "harmless", "q", "good", "bad")
    notes = run_hhh([comparison], Scripted(tokenizer=Spaced()), "current").notes
    assert [note for note in notes if "tie" in note] == [
        "faithful: the tokenizer begins A and B with the same token, every comparison is a tie"
    ]


def test_hhh_macro_average_over_categories(test_data: Path) -> None:
    comparisons = hhh.load(test_data)
    good_at_a = {c.prompt(c.chosen, c.rejected): c.category == "harmless" for c in comparisons}
    good_at_b = {c.prompt(c.rejected, c.chosen): c.category != "harmless" for c in comparisons}
    prefers_a = good_at_a | good_at_b
    model = Scripted(log_probability=lambda context, letter: float((letter == "A") == prefers_a[context]))
    result = run_hhh(comparisons, model, "current")
    assert result.by_group("faithful")["harmless"] == 100
    assert result.mean("faithful") == pytest.approx(100 / len(result.groups))


def _first_code_problems(test_data: Path, count: int) -> CodeTask[humaneval.Problem]:
    task = humaneval.load(test_data)
    return replace(task, problems=task.problems[:count])


def test_humaneval_scores_both_clean_ups(test_data: Path) -> None:
    task = _first_code_problems(test_data, 6)
    solutions = {p.question: p.canonical_solution for p in task.problems}
    result = run_code(task, Scripted(answer=lambda prompt: solutions[prompt]))
    assert result.mean("corrected") == 100
    expected = ["\n\n" not in p.canonical_solution.strip("\n") for p in task.problems]
    assert [outcome.scores["faithful"] for outcome in result.outcomes] == expected
    assert result.settings["temperature"] == 0.1


class _Stars:
    """A judge whose review depends on the text."""

    name = "stars"

    def review(self, prompts: list[str]) -> list[str]:
        return ["4 out of 5" if "Text: good" in prompt else "I would say 2. Limited" for prompt in prompts]


def test_impact_with_a_judge_in_both_readings() -> None:
    prompts = [
        impact.WritingPrompt("0", "creative", "You write.", "A poem about rain"),
        impact.WritingPrompt("1", "creative", "You write.", "A python program"),
        impact.WritingPrompt("2", "informative", "You write.", "How do ships float?"),
    ]
    answers = {
        "You write. A poem about rain": "good rain",
        "You write. A python program": "```\nprint(1)\n```",
        "You write. How do ships float?": "def float(ship):\n    return True",
    }
    model = Scripted(answer=lambda prompt: answers[prompt])
    result = run_impact(prompts, model, _Stars())
    assert [o.scores["relevance faithful"] for o in result.outcomes] == [5, 2, 2]
    assert [o.scores["relevance corrected"] for o in result.outcomes] == [4, 2, 2]
    assert result.mean("unasked code") == 0.5  # of the two prompts that ask for none
    assert model.asked == list(answers)


def test_impact_with_the_papers_prompt_in_the_template() -> None:
    prompt = impact.WritingPrompt("0", "creative", "You write", "A poem")
    model = Scripted(answer=lambda text: "x")
    run_impact([prompt], model, None, "output", llama_template("vicuna_v1.1"))
    assert model.asked[0].endswith(" USER: You write.\n\nA poem\nOutput: ASSISTANT:")


def test_impact_with_short_answers() -> None:
    asked: list[int] = []

    class Counting(Scripted):
        def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
            asked.extend(request.max_new_tokens for request in requests)
            return super().generate(requests)

    prompt = impact.WritingPrompt("0", "creative", "You write", "A poem")
    result = run_impact([prompt], Counting(answer=lambda _: "x"), None, max_new_tokens=7)
    assert asked == [7]
    assert result.settings["max_new_tokens"] == 7


def test_a_killed_evaluation_resumes(test_data: Path, tmp_path: Path) -> None:
    task = mmlu.load(test_data, 0, split="val")
    store = tmp_path / "cache.jsonl"
    seen = itertools.count()

    class Killed(Exception):
        pass

    def die_later(prompt: str) -> str:
        if next(seen) > 700:
            raise Killed
        return " B"

    with pytest.raises(Killed):
        run_answers(task, CachedModel(Scripted(answer=die_later), first := Store(store)))  # type: ignore[arg-type]
    first.close()
    with open(store, "ab") as file:
        file.write(b'{"key": "torn')
    model = Scripted(answer=lambda prompt: " B")
    second = Store(store)
    result = run_answers(task, CachedModel(model, second))  # type: ignore[arg-type]
    second.close()
    assert 0 < len(model.asked) < 1531 - 500
    again = Scripted(answer=lambda prompt: pytest.fail("everything is cached"))
    assert run_answers(task, CachedModel(again, Store(store))) == result  # type: ignore[arg-type]


def test_a_kill_during_long_answers_loses_few_of_them(tmp_path: Path) -> None:
    prompts = [impact.WritingPrompt(str(i), "creative", "You write.", f"About {i}") for i in range(7)]

    def die_at_the_sixth(prompt: str) -> str:
        if prompt.endswith("5"):
            raise KeyboardInterrupt
        return "x"

    store = Store(tmp_path / "cache.jsonl")
    with pytest.raises(KeyboardInterrupt):
        run_impact(prompts, CachedModel(Scripted(answer=die_at_the_sixth), store, long_chunk=2), None)
    assert len(store) == 4


def test_prompts_for_code_fit_a_small_context(test_data: Path) -> None:
    """Prompts that are too long lose only their beginning."""
    model = Scripted(context_length=100)
    run_code(_first_code_problems(test_data, 1), model)
    assert len(model.asked[0]) == 100


def test_results_can_be_written_and_read(test_data: Path, tmp_path: Path) -> None:
    result = run_hhh(hhh.load(test_data)[:3], Scripted(), "current")
    write_result(result, tmp_path / "r.json", {"mean": 1})
    back = read_result(tmp_path / "r.json")
    assert back.mean("faithful") == result.mean("faithful")
    assert [o.id for o in back.outcomes] == [o.id for o in result.outcomes]
    assert json.loads((tmp_path / "r.json").read_text())["outcomes"][0]["record"]["prompts"]
