"""Draws a bar chart of a table as SVG: bars with confidence intervals, and a colour for each evaluated model."""

import itertools
import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

from flacuna_jax.evaluation.tables import Cell, Table, TableRow

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")
"""Colours of evaluated models: Paul Tol's bright palette, which colour-blind readers can distinguish."""
PALE = ("#bbccee", "#cceeff", "#ccddaa", "#eeeebb", "#ffcccc", "#dddddd", "#e6cce6")
"""Colours of published rows, less prominent."""
BAR, GAP, HEIGHT, LEFT, TOP = 18, 22, 220, 46, 34
STEPS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 25)
"""Possible intervals between lines of the scale, which has at most six lines."""


def to_svg(table: Table) -> str:
    """Models and published rows of a table, grouped by column."""
    rows = [row for row in table.rows if row.kind != "difference"]
    colours = _colours(rows)
    columns = [i for i in range(len(table.columns)) if any(i < len(r.cells) and r.cells[i] for r in rows)]
    highest = max((_top(row.cells[i]) for row in rows for i in columns), default=0.0) or 1.0
    step = next((step for step in STEPS if highest / step <= 5), highest / 5)
    lines = math.ceil(highest / step)
    top = step * lines
    group = BAR * len(rows) + GAP
    width, legend = LEFT + group * len(columns) + GAP, 18 * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{max(width, 320)}" height="{TOP + HEIGHT + 40 + legend}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="13" font-weight="bold">{escape(table.title)}</text>',
    ]
    for line in range(lines + 1):
        y = TOP + HEIGHT * (1 - line / lines)
        parts.append(f'<line x1="{LEFT}" x2="{width - GAP}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{step * line:.3g}</text>')
    for position, index in enumerate(columns):
        left = LEFT + GAP / 2 + group * position
        parts += _bars([(row.name, row.cells[index]) for row in rows], colours, left, top)
        middle = left + BAR * len(rows) / 2
        parts.append(
            f'<text x="{middle:.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{escape(table.columns[index])}</text>'
        )
    for number, row in enumerate(rows):
        y = TOP + HEIGHT + 34 + 18 * number
        parts.append(f'<rect x="{LEFT}" y="{y - 10}" width="12" height="12" fill="{colours[number]}"/>')
        parts.append(f'<text x="{LEFT + 18}" y="{y}">{escape(row.name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _top(cell: Cell | None) -> float:
    if cell is None or cell.value != cell.value:
        return 0.0
    return max(cell.value, cell.interval.high if cell.interval else cell.value)


def _colours(rows: Sequence[TableRow]) -> list[str]:
    models, published = itertools.cycle(COLOURS), itertools.cycle(PALE)
    return [next(published if row.kind == "published" else models) for row in rows]


def _bars(cells: Sequence[tuple[str, Cell | None]], colours: Sequence[str], left: float, top: float) -> list[str]:
    parts = []
    for number, (name, cell) in enumerate(cells):
        if cell is None or cell.value != cell.value:
            continue
        x, height = left + BAR * number, HEIGHT * cell.value / top
        parts.append(
            f'<rect x="{x:.1f}" y="{TOP + HEIGHT - height:.1f}" width="{BAR - 3}" height="{height:.1f}" '
            f'fill="{colours[number]}"><title>{escape(f"{name}: {cell.text()}")}</title></rect>'
        )
        if cell.interval is not None:
            low, high = (TOP + HEIGHT * (1 - value / top) for value in (cell.interval.low, cell.interval.high))
            middle = x + (BAR - 3) / 2
            parts.append(f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="black"/>')
    return parts
