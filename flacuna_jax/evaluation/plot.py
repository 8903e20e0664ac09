"""A bar chart of a table as SVG, written by hand: bars with their intervals, one colour per model."""

from collections.abc import Sequence
from xml.sax.saxutils import escape

from flacuna_jax.evaluation.tables import Cell, Table

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb")
"""Paul Tol's bright palette: told apart by colour-blind readers too."""
BAR, GAP, HEIGHT, LEFT, TOP = 18, 22, 220, 46, 34


def to_svg(table: Table) -> str:
    """Models and published rows of a table, grouped by column."""
    rows = [row for row in table.rows if row.kind != "difference"]
    columns = [i for i in range(len(table.columns)) if any(i < len(r.cells) and r.cells[i] for r in rows)]
    top = max((_top(row.cells[i]) for row in rows for i in columns), default=1.0) * 1.08 or 1.0
    group = BAR * len(rows) + GAP
    width, legend = LEFT + group * len(columns) + GAP, 18 * len(rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{max(width, 320)}" height="{TOP + HEIGHT + 40 + legend}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="13" font-weight="bold">{escape(table.title)}</text>',
    ]
    for tick in range(5):
        value, y = top * tick / 4, TOP + HEIGHT * (1 - tick / 4)
        parts.append(f'<line x1="{LEFT}" x2="{width - GAP}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for position, index in enumerate(columns):
        left = LEFT + GAP / 2 + group * position
        parts += _bars([row.cells[index] for row in rows], left, top)
        middle = left + BAR * len(rows) / 2
        parts.append(
            f'<text x="{middle:.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">{escape(table.columns[index])}</text>'
        )
    for number, row in enumerate(rows):
        y = TOP + HEIGHT + 34 + 18 * number
        parts.append(f'<rect x="{LEFT}" y="{y - 10}" width="12" height="12" fill="{COLOURS[number % len(COLOURS)]}"/>')
        parts.append(f'<text x="{LEFT + 18}" y="{y}">{escape(row.name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _top(cell: Cell | None) -> float:
    if cell is None or cell.value != cell.value:
        return 0.0
    return max(cell.value, cell.interval.high if cell.interval else cell.value)


def _bars(cells: Sequence[Cell | None], left: float, top: float) -> list[str]:
    parts = []
    for number, cell in enumerate(cells):
        if cell is None or cell.value != cell.value:
            continue
        x, height = left + BAR * number, HEIGHT * cell.value / top
        colour = COLOURS[number % len(COLOURS)]
        parts.append(
            f'<rect x="{x:.1f}" y="{TOP + HEIGHT - height:.1f}" width="{BAR - 3}" height="{height:.1f}" '
            f'fill="{colour}">'
            f"<title>{escape(cell.text())}</title></rect>"
        )
        if cell.interval is not None:
            low, high = (TOP + HEIGHT * (1 - value / top) for value in (cell.interval.low, cell.interval.high))
            middle = x + (BAR - 3) / 2
            parts.append(f'<line x1="{middle:.1f}" x2="{middle:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="black"/>')
    return parts
