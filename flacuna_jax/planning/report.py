"""Plans for people: tables for a terminal, and one HTML file with the memory of each layout as a picture."""

import html
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flacuna_jax.planning.plans import Plan
from flacuna_jax.planning.roofline import summarise

GB = 1e9
_COLOURS = {
    "base weights": "#4e79a7",
    "weights": "#4e79a7",
    "adapters": "#59a14f",
    "optimizer state": "#76b7b2",
    "batch": "#edc948",
    "other": "#bab0ac",
    "temporaries": "#f28e2b",
}


def plan_table(plan: Plan, price: float | None) -> RenderableType:
    """Everything about one plan."""
    statistics, time, workload = plan.workload.statistics, plan.time, plan.workload
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()

    def row(name: str, *lines: str) -> None:
        table.add_row(name, "\n".join(lines))

    source = f"compiled in {plan.compile_seconds:.1f} s" if plan.compiled else "ESTIMATED from the sizes, not compiled"
    row("machine", f"{plan.machine.description}, {plan.machine.target.memory / GB:.1f} GB each")
    row("layout", f"{plan.layout}; {workload.micro_batches(plan.layout)} micro-batches per step")
    row("source", source)
    kinds = ", ".join(f"{kind} {_size(nbytes)}" for kind, nbytes in plan.arguments.items())
    row("arguments", f"{sum(plan.arguments.values()) / GB:.2f} GB: {kinds}")
    row("temporaries", f"{plan.temporaries / GB:.2f} GB")
    row("peak", f"{plan.peak / GB:.2f} GB of {plan.machine.usable_memory / GB:.1f} GB usable, {_headroom(plan)}")
    row(
        "per step",
        f"{plan.work.flops / 1e12:,.0f} TFLOP ({plan.work.attention_flops / 1e12:,.0f} in attention), "
        f"{plan.work.memory_traffic / GB:,.0f} GB through device memory, per device",
    )
    exchanges = [
        f"{r['count']:,.0f} × {r['kind']} over {r['link']}: {_size(r['bytes'])} received, {r['seconds']:.2f} s, "
        f"{r['exposed_seconds']:.2f} s of it with nothing else going on"
        for r in summarise(plan.work.collectives, plan.machine)
    ]
    row("exchanges", *(exchanges or ["none"]))
    links = "".join(f", {link} {seconds:.2f} s" for link, seconds in time.links.items())
    row("time", f"{time.step:.2f} s per step: arithmetic {time.compute:.2f} s, memory {time.memory:.2f} s{links}")
    row("bound by", time.bound)
    row("speed", f"{plan.tokens_per_second:,.0f} tokens/s on all devices")
    assumed = "ASSUMED, the data are not here: " if statistics.assumed else ""
    row(
        "data",
        f"{assumed}{statistics.rows_per_step} rows and {statistics.examples_per_step:.0f} examples per step, "
        f"examples of {statistics.document_length:.0f} tokens, fill {100 * statistics.fill:.1f} %",
    )
    row("run", _run_length(plan, price))
    return table


def _run_length(plan: Plan, price: float | None) -> str:
    if plan.hours is None:
        return "number of steps unknown without the data: say --examples N"
    text = f"{plan.workload.statistics.steps:,} steps, {plan.hours:,.1f} hours"
    cost = plan.cost(price)
    return text if cost is None else f"{text}, {cost:,.0f} at {price:g} per device and hour"


def _headroom(plan: Plan) -> str:
    amount = f"{abs(plan.headroom) / GB:.2f} GB"
    return f"FITS with {amount} to spare" if plan.fits else f"DOES NOT FIT: {amount} too much"


def _size(nbytes: float | str) -> str:
    value = float(nbytes)
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def ranking_table(plans: Sequence[Plan], price: float | None) -> RenderableType:
    """A line per plan, the best first."""
    machine = plans[0].machine
    table = Table(title=f"{machine.description}, {machine.usable_memory / GB:.1f} GB usable per device")
    for name in ("layout", "remat", "micro-batch", "peak GB", "fits", "s/step", "exposed s", "bound by", "hours"):
        table.add_column(name, justify="left" if name in ("layout", "remat", "bound by") else "right")
    if price is not None:
        table.add_column("cost", justify="right")
    for plan in plans:
        mesh, _, rest = str(plan.layout).partition(", remat ")
        remat, _, micro_batch = rest.partition(", micro-batch ")
        cells = [
            *(mesh, remat, micro_batch, f"{plan.peak / GB:.1f}", "yes" if plan.fits else "no"),
            *(f"{plan.time.step:.2f}", f"{plan.time.exposed:.2f}", plan.time.bound),
            "?" if plan.hours is None else f"{plan.hours:,.1f}",
        ]
        cost = plan.cost(price)
        if price is not None:
            cells.append("?" if cost is None else f"{cost:,.0f}")
        table.add_row(*cells, style=None if plan.fits else "dim")
    sources = {"compiled" if plan.compiled else "ESTIMATED from the sizes, not compiled" for plan in plans}
    return Group(table, Text(f"all {' and '.join(sorted(sources))}; {_assumption(plans[0])}"))


def _assumption(plan: Plan) -> str:
    return "data ASSUMED, they are not here" if plan.workload.statistics.assumed else "statistics from the data"


def write_html(path: Path, plans: Sequence[Plan]) -> None:
    """Bars of memory by kind against what is usable, a bar per plan, as one self-contained file."""
    machine = plans[0].machine
    widest = max(machine.usable_memory, *(plan.peak for plan in plans)) * 1.02
    width, height, left = 900, 26, 330
    scale = (width - left - 90) / widest
    parts = []
    for line, plan in enumerate(plans):
        top = 30 + line * height
        parts.append(f'<text x="{left - 8}" y="{top + 14}" text-anchor="end">{html.escape(str(plan.layout))}</text>')
        x = float(left)
        for kind, nbytes in {**plan.arguments, "temporaries": plan.temporaries}.items():
            title = f"{kind}: {_size(nbytes)}"
            parts.append(
                f'<rect x="{x:.1f}" y="{top}" width="{max(0.0, nbytes * scale):.1f}" height="18" '
                f'fill="{_COLOURS[kind]}"><title>{title}</title></rect>'
            )
            x += nbytes * scale
        parts.append(f'<text x="{x + 6:.1f}" y="{top + 14}">{plan.peak / GB:.1f} GB, {plan.time.step:.2f} s</text>')
    bottom = 30 + len(plans) * height
    limit = left + machine.usable_memory * scale
    parts.append(f'<line x1="{limit:.1f}" y1="20" x2="{limit:.1f}" y2="{bottom}" stroke="#e15759" stroke-width="2"/>')
    parts.append(
        f'<text x="{limit:.1f}" y="14" text-anchor="middle" fill="#e15759">{machine.usable_memory / GB:.1f} GB</text>'
    )
    kinds = dict.fromkeys(kind for plan in plans for kind in (*plan.arguments, "temporaries"))
    for number, kind in enumerate(kinds):
        x = left + number * 110
        parts.append(f'<rect x="{x}" y="{bottom + 12}" width="12" height="12" fill="{_COLOURS[kind]}"/>')
        parts.append(f'<text x="{x + 16}" y="{bottom + 22}">{kind}</text>')
    source = "compiled" if all(plan.compiled for plan in plans) else "estimated from the sizes, not compiled"
    title = html.escape(f"Memory per device on {machine.description}")
    path.write_text(
        f'<!doctype html><meta charset="utf-8"><title>{title}</title>'
        f"<h1 style='font:20px sans-serif'>{title}</h1><p style='font:13px sans-serif'>{source}; "
        f"{html.escape(_assumption(plans[0]))}; seconds are of one optimizer step, by roofline</p>"
        f'<svg width="{width}" height="{bottom + 40}" style="font:12px sans-serif">{"".join(parts)}</svg>\n',
        encoding="utf-8",
    )
