"""A report as data: headings, sentences, tables, bar charts; written as Markdown, and as HTML with inline SVG."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Cell = str | int | float


@dataclass(frozen=True)
class Table:
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""


@dataclass(frozen=True)
class Bars:
    """A bar chart; `labels` has a label for every bar, of which only as many are printed as fit."""

    title: str
    labels: Sequence[str]
    values: Sequence[float]
    note: str = ""


@dataclass(frozen=True)
class Text:
    title: str
    lines: Sequence[str]


Part = Table | Bars | Text


@dataclass(frozen=True)
class Document:
    title: str
    facts: Sequence[tuple[str, str]]
    parts: Sequence[Part]


def to_markdown(document: Document) -> str:
    blocks = [f"# {document.title}"]
    blocks.append("\n".join(f"- **{label}**: {value}" for label, value in document.facts))
    for part in document.parts:
        blocks.append(f"## {part.title}")
        if isinstance(part, Text):
            blocks.append("\n".join(f"- {line}" for line in part.lines))
            continue
        if part.note:
            blocks.append(part.note)
        blocks.append(_markdown_table(part) if isinstance(part, Table) else _text_bars(part))
    return "\n\n".join(blocks) + "\n"


def _markdown_table(table: Table) -> str:
    lines = ["| " + " | ".join(table.header) + " |"]
    numeric = [all(not isinstance(row[i], str) for row in table.rows) for i in range(len(table.header))]
    lines.append("|" + "|".join(" ---: " if number else " --- " for number in numeric) + "|")
    for row in table.rows:
        lines.append("| " + " | ".join(show(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |")
    return "\n".join(lines)


def _text_bars(bars: Bars) -> str:
    largest = max(bars.values, default=0) or 1
    width = max(map(len, bars.labels), default=0)
    lines = [
        f"{label:>{width}} {'█' * round(40 * value / largest):<40} {show(value)}"
        for label, value in zip(bars.labels, bars.values, strict=True)
    ]
    return "```\n" + "\n".join(lines) + "\n```"


def show(cell: Cell) -> str:
    """A cell as text: numbers with thousands separators, fractions in a readable form."""
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int) or float(cell).is_integer():
        return f"{int(cell):,}"
    return f"{cell:,.2f}"


_STYLE = """
:root{color-scheme:light dark}
:root{--ink:#1d2433;--soft:#697386;--line:#e3e6ec;--back:#fff;--bar:#3566c8;--tile:#f6f7f9}
@media(prefers-color-scheme:dark){
:root{--ink:#e6e9ef;--soft:#98a2b3;--line:#2c3442;--back:#12161d;--bar:#7aa2f7;--tile:#1a202a}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back)}
body{max-width:1080px;margin:2.5rem auto;padding:0 1.2rem}
h1{font-size:1.6rem;margin:0 0 1rem}h2{font-size:1.1rem;margin:2.2rem 0 .6rem}p{color:var(--soft);margin:.2rem 0 .6rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(170px,1fr));gap:.6rem}
.tiles div{background:var(--tile);border-radius:8px;padding:.6rem .8rem}
.tiles span{display:block;color:var(--soft);font-size:.8rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.86rem}
th{color:var(--soft);font-weight:500;text-align:left;vertical-align:bottom}
td,th{padding:.3rem .6rem;border-bottom:1px solid var(--line)}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
svg{width:100%;height:auto}svg text{fill:var(--soft);font-size:11px}
svg rect{fill:var(--bar)}svg line{stroke:var(--line)}
"""


def to_html(document: Document) -> str:
    facts = "".join(f"<div><span>{escape(k)}</span><b>{escape(v)}</b></div>" for k, v in document.facts)
    body = "".join(_html_part(part) for part in document.parts)
    title = escape(document.title)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>"
        f'<div class="tiles">{facts}</div>{body}</html>\n'
    )


def _html_part(part: Table | Bars | Text) -> str:
    head = f"<h2>{escape(part.title)}</h2>"
    if isinstance(part, Text):
        return head + "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in part.lines) + "</ul>"
    note = f"<p>{escape(part.note)}</p>" if part.note else ""
    return head + note + (_html_table(part) if isinstance(part, Table) else _svg_bars(part))


def _html_table(table: Table) -> str:
    numeric = [all(not isinstance(row[i], str) for row in table.rows) for i in range(len(table.header))]

    def row(cells: Sequence[Cell], tag: str) -> str:
        return "<tr>" + "".join(
            f"<{tag}{' class=n' if number else ''}>{escape(show(cell))}</{tag}>"
            for cell, number in zip(cells, numeric, strict=True)
        )

    rows = "".join(row(cells, "td") for cells in table.rows)
    return f'<div class="scroll"><table>{row(table.header, "th")}{rows}</table></div>'


_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 960, 220, 64, 12, 26


# The package draws four kinds of picture: these bars, curves of a run (logs/report.py), stacked memory of a plan
# (planning/report.py) and grouped scores (evaluation/plot.py). They share escaping and <rect>, not scales or labels; a
# common layer would be longer than what it replaced, and a plotting library is a large dependency for static pages.
def _svg_bars(bars: Bars) -> str:
    count = max(1, len(bars.values))
    largest = max(bars.values, default=0) or 1
    plot_width, plot_height = _WIDTH - _LEFT, _HEIGHT - _TOP - _BOTTOM
    step = plot_width / count
    every = -(-count // 16)
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(bars.title)}">']
    for fraction in (0.0, 0.5, 1.0):
        y = _TOP + plot_height * (1 - fraction)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{show(round(largest * fraction))}</text>'
        )
    for index, (label, value) in enumerate(zip(bars.labels, bars.values, strict=True)):
        x, height = _LEFT + index * step, plot_height * value / largest
        parts.append(
            f'<rect x="{x + step * 0.08:.1f}" y="{_TOP + plot_height - height:.1f}" width="{step * 0.84:.1f}" '
            f'height="{height:.1f}" rx="1.5"><title>{escape(label)}: {show(value)}</title></rect>'
        )
        if index % every == 0:
            parts.append(f'<text x="{x + step / 2:.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(label)}</text>')
    return "".join(parts) + "</svg>"
