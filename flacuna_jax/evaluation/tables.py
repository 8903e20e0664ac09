"""The paper's tables: one's own models, their differences, and the published rows, as Markdown and LaTeX.

A table is made of cells first (`Cell`: number, interval, marks) and turned into text last.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flacuna_jax.evaluation import hhh, impact
from flacuna_jax.evaluation.published import PublishedRow
from flacuna_jax.evaluation.results import HELD_IN, TaskResult
from flacuna_jax.evaluation.statistics import Difference, Interval, confidence_interval, difference

SIGNIFICANT = 0.05
NAMES = {"mmlu": "MMLU", "bbh": "BBH", "drop": "DROP", "crass": "CRASS", "humaneval": "HumanEval", "hhh": "HHH"}


@dataclass(frozen=True)
class Cell:
    """A number of a table. Marks: "*" significant difference, "†" held-in, "‡" not the whole benchmark."""

    value: float
    interval: Interval | None = None
    marks: str = ""
    decimals: int = 1
    signed: bool = False

    def text(self) -> str:
        if math.isnan(self.value):
            return "–"
        sign = "+" if self.signed else ""
        number = f"{self.value:{sign}.{self.decimals}f}{self.marks}"
        if self.interval is None or math.isnan(self.interval.low):
            return number
        return f"{number} [{self.interval.low:.{self.decimals}f}, {self.interval.high:.{self.decimals}f}]"


@dataclass(frozen=True)
class TableRow:
    name: str
    cells: tuple[Cell | None, ...]
    kind: str
    """"model", "difference" or "published"."""


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Column:
    """What a column shows: a score of a task, or of one group of its problems, which has `size` where it is whole."""

    title: str
    task: str
    shots: int
    score: str
    published: str
    group: str | None = None
    size: int = 0
    decimals: int = 1

    def select(self, results: Sequence[TaskResult]) -> TaskResult | None:
        found = next((r for r in results if r.task == self.task and r.shots == self.shots), None)
        if found is None or self.score not in found.score_names:
            return None
        if self.group is None:
            return found
        part = tuple(outcome for outcome in found.outcomes if outcome.group == self.group)
        return (
            TaskResult(found.task, found.shots, found.model, part, "micro", self.size, found.scale, found.notes)
            if part
            else None
        )


def make_tables(
    models: Sequence[Sequence[TaskResult]], published: Sequence[PublishedRow] = (), reading: str = "faithful"
) -> list[Table]:
    """Every table of the paper that the results have something for.

    Args:
      models: the results of each model; the first model is what the others are compared with.
      reading: "faithful" or "corrected".
    """
    tables = [
        _table(f"Few-shot ({reading})", _few_shot(reading), models, published, average=True),
        _table(f"Zero-shot ({reading})", _zero_shot(reading), models, published, average=False),
    ]
    tables += [
        _table(f"HHH, {protocol} protocol ({reading})", _hhh(protocol, reading), models, published, average=False)
        for protocol in ("paper", "current")
    ]
    tables += [
        _table(f"IMPACT, {style} prompt ({reading})", _impact(task, reading), models, published, average=False)
        for task, style in (("impact", "benchmark's"), ("impact_output_prompt", "paper's"))
    ]
    return [table for table in tables if any(row.kind == "model" for row in table.rows)]


def _few_shot(reading: str) -> list[Column]:
    shots = {"mmlu": 5, "bbh": 3, "drop": 3, "crass": 3, "humaneval": 0}
    return [Column(f"{NAMES[task]} ({n}-shot)", task, n, reading, f"{task}/{n}") for task, n in shots.items()]


def _zero_shot(reading: str) -> list[Column]:
    return [Column(f"{NAMES[task]} (0-shot)", task, 0, reading, f"{task}/0") for task in ("mmlu", "bbh", "crass")]


def _hhh(protocol: str, reading: str) -> list[Column]:
    task = f"hhh_{protocol}"
    columns = [Column(c.title(), task, 0, reading, f"hhh/{c}", c, size) for c, size in hhh.SIZES.items()]
    return [*columns, Column("Average", task, 0, reading, "hhh")]


def _impact(task: str, reading: str) -> list[Column]:
    aspects, size = ("relevance", "coherence"), impact.PER_CATEGORY
    columns = [
        Column(f"{c[:3].title()} {a[:3].title()}.", task, 0, f"{a} {reading}", f"impact/{c}/{a}", c, size, decimals=2)
        for c in impact.CATEGORIES
        for a in aspects
    ]
    columns += [Column(f"Avg {a[:3].title()}.", task, 0, f"{a} {reading}", f"impact/{a}", decimals=2) for a in aspects]
    return [*columns, Column("Unasked code %", task, 0, "unasked code", "")]


def _table(
    title: str,
    columns: Sequence[Column],
    models: Sequence[Sequence[TaskResult]],
    published: Sequence[PublishedRow],
    *,
    average: bool,
) -> Table:
    used = [c for c in columns if any(c.select(results) is not None for results in models)]
    rows: list[TableRow] = []
    notes: dict[str, None] = {}
    for results in models:
        chosen = [column.select(results) for column in used]
        if not any(chosen):
            continue
        name = next(result.model for result in chosen if result is not None)
        cells = [None if r is None else _cell(r, column) for r, column in zip(chosen, used, strict=True)]
        rows.append(TableRow(name, tuple(_with_average(cells, average)), "model"))
        notes |= dict.fromkeys(f"{r.task}: {note}" for r in chosen if r is not None for note in r.notes)
    for results in models[1:]:
        row = _difference_row(used, models[0], results, average)
        if row is not None:
            rows.append(row)
    for entry in published:
        known = [entry.scores.get(column.published) for column in used]
        if any(value is not None for value in known):
            cells = [
                None
                if value is None
                else Cell(
                    value, None, "†" if column.task in HELD_IN and "Flacuna" in entry.model else "", column.decimals
                )
                for value, column in zip(known, used, strict=True)
            ]
            rows.append(TableRow(f"{entry.model} (published)", tuple(_with_average(cells, average)), "published"))
    titles = tuple(column.title for column in used) + (("Average",) if average and len(used) > 1 else ())
    return Table(title, titles, tuple(rows), (*_legend(rows), *notes))


def _cell(result: TaskResult, column: Column) -> Cell:
    marks = ("†" if result.task in HELD_IN else "") + ("" if result.complete else "‡")
    scale = 100.0 if column.score == "unasked code" else 1.0
    interval = confidence_interval(result, column.score)
    value = result.mean(column.score) * scale
    return Cell(value, Interval(interval.low * scale, interval.high * scale), marks, column.decimals)


def _difference_row(
    columns: Sequence[Column], base: Sequence[TaskResult], other: Sequence[TaskResult], average: bool
) -> TableRow | None:
    cells: list[Cell | None] = []
    names: tuple[str, str] | None = None
    for column in columns:
        first, second = column.select(base), column.select(other)
        if first is None or second is None:
            cells.append(None)
            continue
        names = (first.model, second.model)
        found = difference(first, second, column.score)
        scale = 100.0 if column.score == "unasked code" else 1.0
        mark = "*" if found.p_value < SIGNIFICANT else ""
        interval = Interval(found.interval.low * scale, found.interval.high * scale)
        cells.append(Cell(found.mean * scale, interval, mark, column.decimals, signed=True))
    if names is None:
        return None
    return TableRow(f"{names[1]} − {names[0]}", tuple(_with_average(cells, average)), "difference")


def _with_average(cells: Sequence[Cell | None], wanted: bool) -> list[Cell | None]:
    """The plain mean of the columns, as in the paper, where no column is empty."""
    if not wanted or len(cells) < 2:
        return list(cells)
    values = [cell.value for cell in cells if cell is not None]
    if len(values) < len(cells):
        return [*cells, None]
    present = [cell for cell in cells if cell is not None]
    marks = "‡" if any("‡" in cell.marks for cell in present) else ""
    return [*cells, Cell(sum(values) / len(values), marks=marks, signed=any(cell.signed for cell in present))]


def _legend(rows: Sequence[TableRow]) -> list[str]:
    legend = {
        "†": "† held-in: FLAN-mini contains training data of this benchmark",
        "‡": "‡ not the whole benchmark",
        "*": f"* p < {SIGNIFICANT}, paired test on the same problems (McNemar, or permutation of signs)",
    }
    used = {mark for row in rows for cell in row.cells if cell is not None for mark in cell.marks}
    notes = [text for mark, text in legend.items() if mark in used]
    if any(cell is not None and cell.interval is not None for row in rows for cell in row.cells):
        notes.append("[low, high]: 95 % bootstrap interval over problems")
    return notes


def all_differences(base: Sequence[TaskResult], other: Sequence[TaskResult]) -> dict[tuple[str, int, str], Difference]:
    """Differences in every score of every task that both have, by (task, shots, score)."""
    pairs = [(a, b) for a in base for b in other if (a.task, a.shots) == (b.task, b.shots)]
    return {(a.task, a.shots, score): difference(a, b, score) for a, b in pairs for score in a.score_names}


def to_markdown(table: Table) -> str:
    lines = [f"### {table.title}", "", "| | " + " | ".join(table.columns) + " |"]
    lines.append("|---|" + "---:|" * len(table.columns))
    for row in table.rows:
        lines.append(f"| {row.name} | " + " | ".join(c.text() if c else "" for c in row.cells) + " |")
    return "\n".join([*lines, "", *(f"{note}  " for note in table.notes)]).rstrip() + "\n"


def to_latex(table: Table) -> str:
    """A booktabs table; differences and published rows are set off by rules."""
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_latex(table.title)}}}"]
    lines += [rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}", r"\toprule"]
    lines += [" & " + " & ".join(map(_latex, table.columns)) + r" \\", r"\midrule"]
    kind = table.rows[0].kind if table.rows else ""
    for row in table.rows:
        if row.kind != kind:
            lines.append(r"\midrule")
            kind = row.kind
        cells = (_latex(cell.text()) if cell else "" for cell in row.cells)
        lines.append(f"{_latex(row.name)} & " + " & ".join(cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    if table.notes:
        notes = r"\par ".join(map(_latex, table.notes))  # not \\, which takes "[low, high]" for an argument
        lines += [r"\par\medskip", rf"\begin{{minipage}}{{\linewidth}}\footnotesize {notes}\end{{minipage}}"]
    return "\n".join([*lines, r"\end{table}"]) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}",
    "†": r"$^\dagger$",
    "‡": r"$^\ddagger$",
    "−": "--",
    "–": "--",
    "*": "$^{*}$",
    "<": "$<$",
    ">": "$>$",
} | {c: f"\\{c}" for c in "&%$#_{}"}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(c, c) for c in text)
