"""Draws lines over training steps as SVG."""

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

from flacuna_jax.evaluation.plot import COLOURS

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 560, 240, 46, 34, 30
LINES = 4
"""Intervals between the lines of the scale."""
DASH = "6 4"

Line = Sequence[float]


def to_svg(title: str, lines: Mapping[str, Line], dashed: Sequence[str] = ()) -> str:
    """Values of step 1, 2, ... of each line; those in `dashed` are drawn with dashes.

    Raises:
      ValueError: there is no value.
    """
    values = [value for line in lines.values() for value in line]
    if not values:
        raise ValueError("nothing to draw")
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    longest = max(len(line) for line in lines.values())
    inner = HEIGHT - TOP - BOTTOM

    def at(step: int, value: float) -> str:
        x = LEFT + (WIDTH - LEFT - 10) * step / max(longest - 1, 1)
        return f"{x:.1f},{TOP + inner * (high - value) / span:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT + 18 * len(lines)}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{LEFT}" y="18" font-size="13" font-weight="bold">{escape(title)}</text>',
    ]
    for number in range(LINES + 1):
        y, value = TOP + inner * number / LINES, high - span * number / LINES
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 12}">step 1</text>')
    parts.append(f'<text x="{WIDTH - 10}" y="{HEIGHT - 12}" text-anchor="end">{longest}</text>')
    for number, (name, line) in enumerate(lines.items()):
        points = " ".join(at(step, value) for step, value in enumerate(line))
        colour = COLOURS[number % len(COLOURS)]
        dash = f' stroke-dasharray="{DASH}"' if name in dashed else ""
        y = HEIGHT + 18 * number
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>')
        parts.append(f'<line x1="{LEFT}" x2="{LEFT + 14}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"{dash}/>')
        parts.append(f'<text x="{LEFT + 20}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
