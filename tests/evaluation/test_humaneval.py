"""Runs the reference solutions after both clean-ups: 130 of 164 pass after the original's, all after ours."""

from pathlib import Path

import pytest

from flacuna_jax.evaluation.humaneval import Problem, corrected_completion, faithful_completion, load
from flacuna_jax.evaluation.programs import pass_at_k
from flacuna_jax.evaluation.sandbox import run_programs


def _passed(programs: list[str]) -> int:
    return sum(verdict.passed for verdict in run_programs(programs))


def test_canonical_solutions_pass_as_published(test_data: Path) -> None:
    problems = load(test_data).problems
    assert len(problems) == 164
    assert _passed([p.program(faithful_completion(p.canonical_solution)) for p in problems]) == 130
    assert _passed([p.program(corrected_completion(p.canonical_solution, p)) for p in problems]) == 164


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer",
    [
        lambda p: p.canonical_solution.lstrip(" "),
        lambda p: p.canonical_solution + "\n\nprint(input())\nThis function does what was asked.",
        lambda p: f"Sure:\n```python\n{p.prompt}{p.canonical_solution}```\nIt works as follows.",
    ],
    ids=["without leading spaces", "followed by other text", "rewritten in a fence"],
)
def test_canonical_solutions_pass_in_other_forms(test_data: Path, answer) -> None:  # type: ignore[no-untyped-def]
    problems = load(test_data).problems
    assert _passed([p.program(corrected_completion(answer(p), p)) for p in problems]) == 164


def test_clean_ups_on_one_answer() -> None:
    problem = Problem("x", 'def f(a):\n    """Adds."""\n', "f", "", "")
    answer = "   b = a\n\n    return b\n\n\nprint(f(1))"  # what a tokenizer leaves of four spaces
    assert faithful_completion(answer) == "    b = a"
    assert corrected_completion(answer, problem) == "    b = a\n\n    return b\n\n\n"
    helper = "    return g(a)\n\ndef g(a):\n    return a\n\nassert f(1) == 1"
    assert corrected_completion(helper, problem) == "    return g(a)\n\ndef g(a):\n    return a\n\n"
    assert problem.program("    return 1").endswith("return 1\n\ncheck(f)")


def test_pass_at_k() -> None:
    assert pass_at_k(10, 0, 1) == 0
    assert pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert pass_at_k(10, 3, 10) == 1
    assert pass_at_k(5, 2, 3) == pytest.approx(1 - 1 / 10)  # one of C(5, 3) draws misses both
    with pytest.raises(ValueError, match="needs at least 10"):
        pass_at_k(1, 1, 10)
