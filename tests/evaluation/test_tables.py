"""Statistics equal closed forms, and tables show the numbers of their results."""

import math
from collections.abc import Sequence
from xml.etree import ElementTree

import numpy as np
import pytest

from flacuna_jax.errors import UserError
from flacuna_jax.evaluation.plot import to_svg
from flacuna_jax.evaluation.published import published_rows
from flacuna_jax.evaluation.registry import BENCHMARKS
from flacuna_jax.evaluation.results import Outcome, TaskResult
from flacuna_jax.evaluation.statistics import confidence_interval, difference, mcnemar
from flacuna_jax.evaluation.tables import make_tables, to_latex, to_markdown

COLUMNS = [column for benchmark in BENCHMARKS for column in benchmark.columns]


def _result(
    values: Sequence[float | None],
    model: str = "m",
    task: str = "mmlu",
    groups: Sequence[str] | None = None,
    shots: int = 5,
) -> TaskResult:
    names = groups or ["g"] * len(values)
    outcomes = tuple(
        Outcome(str(i), name, {"faithful": v, "corrected": v}, {})
        for i, (v, name) in enumerate(zip(values, names, strict=True))
    )
    average = "micro" if groups is None else "macro"
    return TaskResult(task, shots, model, outcomes, average, len(values))  # type: ignore[arg-type]


def test_bootstrap_interval_equals_the_binomial_interval() -> None:
    values = np.zeros(400)
    values[:100] = 1
    interval = confidence_interval(_result(values.tolist()), "faithful")
    half = 1.96 * math.sqrt(0.25 * 0.75 / 400) * 100
    # 10,000 resamples of a discrete mean: quantiles are known to about a quarter of a point.
    assert interval.low == pytest.approx(25 - half, abs=0.4)
    assert interval.high == pytest.approx(25 + half, abs=0.4)


def test_macro_interval_draws_within_groups() -> None:
    """A group in which all answers are right, or all are wrong, adds no uncertainty."""
    values = [1.0] * 50 + [0.0] * 50
    interval = confidence_interval(_result(values, groups=["a"] * 50 + ["b"] * 50), "faithful")
    assert (interval.low, interval.high) == (50, 50)


@pytest.mark.parametrize(("gained", "lost", "p"), [(0, 0, 1), (5, 5, 1), (10, 0, 2 / 1024), (8, 2, 112 / 1024)])
def test_mcnemar_equals_the_exact_binomial_test(gained: int, lost: int, p: float) -> None:
    assert mcnemar(gained, lost) == pytest.approx(p)
    assert mcnemar(lost, gained) == pytest.approx(p)


def test_mcnemar_with_thousands_of_discordant_pairs() -> None:
    assert mcnemar(5000, 5000) == 1
    assert 0 < mcnemar(5300, 4700) < 1e-8


def test_difference_of_right_and_wrong_answers() -> None:
    first = _result([0.0] * 10 + [1.0] * 90)
    second = _result([1.0] * 10 + [1.0] * 88 + [0.0] * 2)
    found = difference(first, second, "faithful")
    assert found.mean == pytest.approx(8)
    assert found.p_value == pytest.approx(mcnemar(10, 2))
    assert found.interval.low < 8 < found.interval.high


def test_permutation_test_equals_the_sign_test_if_all_differences_are_equal() -> None:
    first, second = _result([0.2] * 12, task="impact"), _result([0.5] * 9 + [-0.1] * 3, task="impact")
    found = difference(first, second, "faithful")
    assert found.test == "paired permutation"
    assert found.p_value == pytest.approx(mcnemar(9, 3), abs=0.02)


def test_columns_of_a_group_are_marked_if_the_group_is_incomplete() -> None:
    """All of HHH's 58 harmless comparisons, and two of the 59 helpful ones."""
    result = _result([1.0] * 60, task="hhh_paper", groups=["harmless"] * 58 + ["helpful"] * 2, shots=0)
    (table,) = (table for table in make_tables([[result]], COLUMNS) if table.title.startswith("HHH, paper"))
    marks = {title: cell.marks for title, cell in zip(table.columns, table.rows[0].cells, strict=True) if cell}
    assert (marks["Harmless"], marks["Helpful"]) == ("", "‡")


def test_scores_that_do_not_apply_are_excluded() -> None:
    first, second = _result([1.0, None, 0.0]), _result([1.0, 1.0, 1.0])
    assert first.mean("faithful") == 50
    assert difference(first, second, "faithful").mean == pytest.approx(50)
    assert math.isnan(_result([None]).mean("faithful"))


def test_comparing_results_on_different_problems_is_an_error() -> None:
    with pytest.raises(UserError, match="not scored on the same problems"):
        difference(_result([1.0]), _result([1.0, 0.0]), "faithful")


def _models() -> list[list[TaskResult]]:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 2, 200).astype(float)
    better = np.maximum(base, rng.random(200) < 0.4)
    return [
        [_result(values.tolist(), name), _result(values.tolist(), name, "drop", shots=3)]
        for name, values in (("base", base), ("tuned_1 & co", better))
    ]


def test_tables_have_models_differences_and_published_rows() -> None:
    table = make_tables(_models(), COLUMNS, published_rows())[0]
    assert table.columns == ("MMLU (5-shot)", "DROP (3-shot)", "Average")
    kinds = [row.kind for row in table.rows]
    assert kinds == sorted(kinds, key=["model", "difference", "published"].index)
    rows = {row.name: row for row in table.rows}
    mean = rows["base"].cells[0]
    gain = rows["tuned_1 & co − base"].cells[0]
    assert mean is not None
    assert gain is not None
    assert gain.marks == "*"
    assert rows["tuned_1 & co"].cells[0].value == pytest.approx(mean.value + gain.value)  # type: ignore[union-attr]
    flacuna = rows["Flacuna 13B (published)"]
    assert [cell.text() for cell in flacuna.cells if cell] == ["51.1", "43.6†", "47.4"]
    assert any("held-in" in note for note in table.notes)


def test_markdown_latex_and_plot() -> None:
    table = make_tables(_models(), COLUMNS, published_rows())[0]
    markdown = to_markdown(table)
    widths = {line.count("|") for line in markdown.splitlines() if line.startswith("|")}
    assert widths == {len(table.columns) + 2}
    latex = to_latex(table)
    assert r"tuned\_1 \& co" in latex
    assert latex.count(r"\\") >= len(table.rows)
    assert r"$^\dagger$" in latex
    assert "\\\\[" not in latex  # a line break that takes what follows for a length
    assert "p $<$ 0.05" in latex
    drawn = ElementTree.fromstring(to_svg(table))
    bars = [e for e in drawn if e.tag.endswith("rect") and len(e)]
    assert len(bars) == sum(cell is not None for row in table.rows if row.kind != "difference" for cell in row.cells)


def test_published_averages_are_those_of_their_rows() -> None:
    """The paper's average column (43.8, 38.7, 40.9) follows from the rows."""
    few_shot = ("mmlu/5", "bbh/3", "drop/3", "crass/3", "humaneval/0")
    averages = {
        row.model: round(sum(row.scores[key] for key in few_shot) / 5, 1)
        for row in published_rows()
        if set(few_shot) <= set(row.scores)
    }
    assert averages["Flacuna 13B"] == 43.8
    assert averages["Vicuna 13B"] == 38.7
    assert averages["StableVicuna 13B"] == 40.9
    assert averages["LLaMA 13B"] == 38.2
