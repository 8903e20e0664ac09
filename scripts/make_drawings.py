"""Draws packed rows with their mask, and the way of the weights, for the documentation.

make demo                            # the data of the packed rows
python scripts/make_drawings.py      # writes docs/pictures/packing.svg and weights.svg
"""

import html
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flacuna_jax import load_config, read_data
from flacuna_jax.data.packing import pack
from flacuna_jax.kernels.packed_mask import make_packed_mask

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#76b7b2", "#e15759", "#9c755f", "#edc948")
ROWS = 8


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    (PICTURES / "packing.svg").write_text(packing())
    (PICTURES / "weights.svg").write_text(weights())


def packing() -> str:
    """The first rows of the demo's first epoch, and the mask of the first of them."""
    config = load_config("configs/demo.yaml", ["--model.tokenizer=runs/demo/tokenizer"])
    store, length = read_data(config).store, config.data.max_length
    plan = pack(store.lengths, length, config.data.packing, config.seed, 0)
    scale, height = 2.2, 22
    drawn = [text(0, 12, f"{ROWS} rows of {length} tokens")]
    for row in range(ROWS):
        y, x = 24 + row * (height + 6), 0.0
        drawn.append(box(0, y, length * scale, height, "#eceff1"))
        for number, example in enumerate(plan.row(row)):
            mask = store.example(example).loss_mask
            colour = COLOURS[number % len(COLOURS)]
            drawn.append(box(x, y, len(mask) * scale, height, colour, 0.45))
            for start, stop in runs(mask):
                drawn.append(box(x + start * scale, y, (stop - start) * scale, height, colour))
            x += len(mask) * scale
    legend = 24 + ROWS * (height + 6) + 14
    drawn += [
        *(box(0, legend, 14, 14, COLOURS[0], 0.45), text(20, legend + 12, "prompt")),
        *(box(90, legend, 14, 14, COLOURS[0]), text(110, legend + 12, "answer: these tokens carry loss")),
        *(box(330, legend, 14, 14, "#eceff1"), text(350, legend + 12, "padding")),
    ]
    left = length * scale + 50
    drawn.append(text(left, 12, "mask of row 1"))
    drawn.append(box(left, 24, length, length, "#eceff1"))
    segments = np.zeros(length, np.int32)
    documents = np.repeat(np.arange(len(plan.row(0))) + 1, store.lengths[plan.row(0)])
    segments[: len(documents)] = documents
    starts = np.asarray(make_packed_mask(segments[None]).start_bt)[0]
    for query in range(len(documents)):
        colour = COLOURS[(segments[query] - 1) % len(COLOURS)]
        drawn.append(box(left + starts[query], 24 + query, query - starts[query] + 1, 1.2, colour))
    drawn.append(text(left, 24 + length + 18, "each line: what one token sees"))
    return svg(drawn, left + length, max(legend + 24, 24 + length + 24))


def weights() -> str:
    """Boxes and arrows, in reading order."""
    boxes = {
        "files": (0, 60, ["Hugging Face files", "or GGUF, native, the Hub"]),
        "arrays": (230, 60, ["one layer at a time", "stacked, split over devices"]),
        "base": (460, 0, ["frozen base", "bfloat16, nf4 or int8"]),
        "adapter": (460, 120, ["adapters, float32", "the only trained arrays"]),
        "step": (690, 60, ["compiled step", "one program per run"]),
        "checkpoint": (920, 0, ["checkpoint", "adapters, optimizer, facts"]),
        "delivery": (920, 120, ["adapter or whole model", "read back and compared"]),
    }
    arrows = [("files", "arrays"), ("arrays", "base"), ("base", "step"), ("adapter", "step")]
    arrows += [("step", "checkpoint"), ("step", "delivery")]
    drawn = [DEFINITIONS]
    for x, y, lines in boxes.values():
        drawn.append(box(x + 1, y + 1, 190, 56, "#e8eaf6", radius=6, border="#3f51b5"))
        drawn += [text(x + 96, y + 24 + 18 * n, line, "middle", bold=n == 0) for n, line in enumerate(lines)]
    for one, other in arrows:
        (x, y, _), (to_x, to_y, _) = boxes[one], boxes[other]
        drawn.append(
            f'<line x1="{x + 192}" y1="{y + 29}" x2="{to_x - 4}" y2="{to_y + 29}" stroke="#3f51b5" '
            'stroke-width="1.5" marker-end="url(#tip)"/>'
        )
    return svg(drawn, 1112, 180)


DEFINITIONS = (
    '<defs><marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0 8 4 0 8z" fill="#3f51b5"/></marker></defs>'
)


def runs(mask: np.ndarray) -> Iterator[tuple[int, int]]:
    """Begin and end of each run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def box(
    x: float, y: float, width: float, height: float, fill: str, opacity: float = 1, radius: float = 0, border: str = ""
) -> str:
    extra = f' fill-opacity="{opacity}"' if opacity < 1 else ""
    extra += f' rx="{radius}"' if radius else ""
    extra += f' stroke="{border}"' if border else ""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"{extra}/>'


def text(x: float, y: float, words: str, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{html.escape(words)}</text>'


def svg(parts: list[str], width: float, height: float, margin: int = 16) -> str:
    """A picture on white, so that it is readable in dark pages, too."""
    lines = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{-margin} {-margin} {width + 2 * margin:.0f} '
        f'{height + 2 * margin:.0f}" font-family="system-ui, sans-serif" font-size="13">\n'
        f'<rect x="{-margin}" y="{-margin}" width="100%" height="100%" fill="#ffffff"/>\n{lines}\n</svg>\n'
    )


if __name__ == "__main__":
    main()
