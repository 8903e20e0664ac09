"""Tables of models, their differences and published rows, as Markdown and LaTeX.

`make_tables` computes cells (`Cell`: number, interval, marks); `to_markdown` and `to_latex` format them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from flacuna_jax.evaluation.benchmark import Column, Reading, TableSpec
from flacuna_jax.evaluation.published import PublishedRow
from flacuna_jax.evaluation.results import TaskResult
from flacuna_jax.evaluation.statistics import Difference, Interval, confidence_interval, difference

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Cell:
    """A number of a table. Marks: "*" significant difference, "†" held-in, "‡" incomplete benchmark."""

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


def make_tables(
    models: Sequence[Sequence[TaskResult]],
    columns: Sequence[Column],
    published: Sequence[PublishedRow] = (),
    reading: Reading = "faithful",
) -> list[Table]:
    """The tables of the columns, in the order of their first columns, without tables that have no result.

    Args:
      models: The results of each model; the first model is what the others are compared with.
      columns: Those of all benchmarks.
    """
    specs: dict[TableSpec, list[Column]] = {}
    for column in columns:
        specs.setdefault(column.table, []).append(column)
    tables = [_table(spec, own, models, published, reading) for spec, own in specs.items()]
    return [table for table in tables if any(row.kind == "model" for row in table.rows)]


def _select(column: Column, reading: Reading, results: Sequence[TaskResult]) -> TaskResult | None:
    """The result for a column, restricted to the column's group; None if the task was not run."""
    found = next((r for r in results if r.task == column.task and r.shots == column.shots), None)
    if found is None or column.scores[reading] not in found.score_names:
        return None
    if column.group is None:
        return found
    part = tuple(outcome for outcome in found.outcomes if outcome.group == column.group)
    return replace(found, outcomes=part, average="micro", expected=column.size) if part else None


def _table(
    spec: TableSpec,
    columns: Sequence[Column],
    models: Sequence[Sequence[TaskResult]],
    published: Sequence[PublishedRow],
    reading: Reading,
) -> Table:
    used = [c for c in columns if any(_select(c, reading, results) is not None for results in models)]
    rows: list[TableRow] = []
    notes: dict[str, None] = {}
    for results in models:
        chosen = [_select(column, reading, results) for column in used]
        if not any(chosen):
            continue
        name = next(result.model for result in chosen if result is not None)
        cells = [None if r is None else _cell(r, column, reading) for r, column in zip(chosen, used, strict=True)]
        rows.append(TableRow(name, tuple(_with_average(cells, spec.average)), "model"))
        notes |= dict.fromkeys(f"{r.task}: {note}" for r in chosen if r is not None for note in r.notes)
    for results in models[1:]:
        row = _difference_row(spec, used, models[0], results, reading)
        if row is not None:
            rows.append(row)
    for entry in published:
        known = [entry.scores.get(column.published) for column in used]
        if any(value is not None for value in known):
            cells = [
                None
                if value is None
                else Cell(value, None, "†" if column.held_in and entry.held_in else "", column.decimals)
                for value, column in zip(known, used, strict=True)
            ]
            rows.append(TableRow(f"{entry.model} (published)", tuple(_with_average(cells, spec.average)), "published"))
    titles = tuple(column.title for column in used) + (("Average",) if spec.average and len(used) > 1 else ())
    return Table(f"{spec.title} ({reading})", titles, tuple(rows), (*_legend(rows), *notes))


def _cell(result: TaskResult, column: Column, reading: Reading) -> Cell:
    marks = ("†" if column.held_in else "") + ("" if result.complete else "‡")
    score = column.scores[reading]
    interval = _scaled(confidence_interval(result, score), column.factor)
    return Cell(result.mean(score) * column.factor, interval, marks, column.decimals)


def _scaled(interval: Interval, factor: float) -> Interval:
    return Interval(interval.low * factor, interval.high * factor)


def _difference_row(
    spec: TableSpec,
    columns: Sequence[Column],
    base: Sequence[TaskResult],
    other: Sequence[TaskResult],
    reading: Reading,
) -> TableRow | None:
    cells: list[Cell | None] = []
    names: tuple[str, str] | None = None
    for column in columns:
        first, second = (_select(column, reading, results) for results in (base, other))
        if first is None or second is None:
            cells.append(None)
            continue
        names = (first.model, second.model)
        found = difference(first, second, column.scores[reading])
        mark = "*" if found.p_value < SIGNIFICANT else ""
        interval = _scaled(found.interval, column.factor)
        cells.append(Cell(found.mean * column.factor, interval, mark, column.decimals, signed=True))
    if names is None:
        return None
    return TableRow(f"{names[1]} − {names[0]}", tuple(_with_average(cells, spec.average)), "difference")


def _with_average(cells: Sequence[Cell | None], wanted: bool) -> list[Cell | None]:
    """Appends the plain mean of the columns, as in the paper, if no column is empty."""
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
    """Differences in every score of every task that both models have, by (task, shots, score)."""
    pairs = [(a, b) for a in base for b in other if (a.task, a.shots) == (b.task, b.shots)]
    return {(a.task, a.shots, score): difference(a, b, score) for a, b in pairs for score in a.score_names}


def to_markdown(table: Table) -> str:
    lines = [f"### {table.title}", "", "| | " + " | ".join(table.columns) + " |"]
    lines.append("|---|" + "---:|" * len(table.columns))
    for row in table.rows:
        lines.append(f"| {row.name} | " + " | ".join(c.text() if c else "" for c in row.cells) + " |")
    return "\n".join([*lines, "", *(f"{note}  " for note in table.notes)]).rstrip() + "\n"


def to_latex(table: Table) -> str:
    """A booktabs table with rules before differences and published rows."""
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
        notes = r"\par ".join(map(_latex, table.notes))  # not \\, which would take "[low, high]" as its argument
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
