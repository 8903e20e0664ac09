"""Formats plans: tables for a terminal, and an HTML file with a chart of the memory of each layout."""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from flacuna_jax.errors import UserError
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
    """A table of one plan."""
    statistics, time, workload = plan.workload.statistics, plan.time, plan.workload
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()

    def row(name: str, *lines: str) -> None:
        table.add_row(name, "\n".join(lines))

    source = f"{plan.source} in {plan.compile_seconds:.1f} s" if plan.compiled else plan.source
    row("machine", f"{plan.machine.description}, {plan.machine.target.memory / GB:.1f} GB each")
    row("layout", f"{plan.name}; {workload.micro_batches(plan.layout)} micro-batches per step")
    row("source", source, *([plan.refused] if plan.refused else []))
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
        f"{r['exposed_seconds']:.2f} s of it not overlapped"
        for r in summarise(plan.work.collectives, plan.machine)
    ]
    row("exchanges", *(exchanges or ["none"]))
    links = "".join(f", {link} {seconds:.2f} s" for link, seconds in time.links.items())
    if time.overhead:
        links = f", overhead {time.overhead:.2f} s{links}"
    parts = f"arithmetic {time.compute:.2f} s, memory {time.memory:.2f} s{links}"
    row("time", f"{time.step:.2f} s per step: {parts}", plan.origin_of_seconds)
    row("bound by", time.bound)
    row("speed", f"{plan.tokens_per_second:,.0f} tokens/s on all devices")
    assumed = "ASSUMED, the data are not on this machine: " if statistics.assumed else ""
    examples = statistics.examples_of_a_step or f"{statistics.examples_per_step:.0f}"
    row(
        "data",
        f"{assumed}{statistics.rows_per_step} rows and {examples} examples per step, "
        f"documents of {statistics.document_length:.0f} tokens, fill {100 * statistics.fill:.1f} %",
    )
    row("run", _run_length(plan, price))
    return table


def _run_length(plan: Plan, price: float | None) -> str:
    if plan.hours is None:
        return "number of steps unknown without the data; give --examples N"
    text = f"{plan.workload.statistics.steps:,} steps, {_time(plan.hours)}"
    cost = plan.cost(price)
    return text if cost is None else f"{text}, {cost:,.0f} at {price:g} per device and hour"


def _time(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:,.1f} minutes"


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
    """A table with one plan per row, the best first."""
    machine = plans[0].machine
    title = Text(f"{machine.description}, {machine.usable_memory / GB:.1f} GB usable per device", style="bold")
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("layout", "base", "remat", "rows", "peak GB", "fits", "s/step", "exposed", "bound by", "hours"):
        table.add_column(
            name, justify="left" if name in ("layout", "base", "remat", "bound by") else "right", no_wrap=True
        )
    if price is not None:
        table.add_column("cost", justify="right")
    for plan in plans:
        mesh, _, rest = str(plan.layout).partition(", remat ")
        remat, _, micro_batch = rest.partition(", micro-batch ")
        cells = [
            *(mesh, plan.workload.spec.quantization or plan.workload.spec.param_dtype),
            *(remat, micro_batch, f"{plan.peak / GB:.1f}", "yes" if plan.fits else "no"),
            *(f"{plan.time.step:.2f}", f"{plan.time.exposed:.2f}", plan.time.bound),
            "?" if plan.hours is None else f"{plan.hours:,.1f}",
        ]
        cost = plan.cost(price)
        if price is not None:
            cells.append("?" if cost is None else f"{cost:,.0f}")
        table.add_row(*cells, style=None if plan.fits else "dim")
    sources = {plan.source for plan in plans}
    note = (
        f"all {' and '.join(sorted(sources))}; {_assumption(plans[0])}; rows: per device and pass; exposed: seconds of "
        f"communication that is not overlapped; seconds: {plans[0].origin_of_seconds}"
    )
    return Group(title, table, Text(note, style="dim"), Text())


def _assumption(plan: Plan) -> str:
    return (
        "data ASSUMED, they are not on this machine" if plan.workload.statistics.assumed else "statistics from the data"
    )


def write_html(path: Path, plans: Sequence[Plan]) -> None:
    """Writes a self-contained file with a chart of memory by kind, usable memory and seconds per step of each plan.

    Raises UserError if it cannot be written.
    """
    machine, best = plans[0].machine, plans[0]
    kinds = _worth_showing(plans)
    line, top = 26, 44
    bottom = top + len(plans) * line
    memory = _Axis(330, 400, max(machine.usable_memory, *(plan.peak for plan in plans)))
    seconds = _Axis(820, 200, max(plan.time.step for plan in plans))
    parts = [_text(memory.left, 14, "memory per device"), _text(seconds.left, 14, "seconds per step")]
    for number, plan in enumerate(plans):
        y = top + number * line
        parts.append(_text(memory.left - 8, y + 14, plan.name, "end"))
        x = 0.0
        for kind, nbytes in kinds(plan).items():
            parts.append(memory.bar(x, nbytes, y, _COLOURS[kind], f"{kind}: {_size(nbytes)}"))
            x += nbytes
        parts.append(_text(memory.at(x) + 6, y + 14, f"{plan.peak / GB:.1f} GB"))
        colour = "#4e79a7" if plan.fits else "#d0d0d0"
        parts.append(seconds.bar(0, plan.time.step, y, colour, f"bound by {plan.time.bound}"))
        parts.append(_text(seconds.at(plan.time.step) + 6, y + 14, f"{plan.time.step:.2f} s"))
    limit = memory.at(machine.usable_memory)
    parts.append(
        f'<line x1="{limit:.1f}" y1="{top - 8}" x2="{limit:.1f}" y2="{bottom}" stroke="#e15759" stroke-width="2"/>'
        + _text(limit, top - 13, f"usable: {machine.usable_memory / GB:.1f} GB", "middle")
    )
    shown = list(dict.fromkeys(kind for plan in plans for kind in kinds(plan)))
    for number, kind in enumerate(shown):
        x = memory.left + number * 130
        parts.append(f'<rect x="{x}" y="{bottom + 14}" width="12" height="12" fill="{_COLOURS[kind]}"/>')
        parts.append(_text(x + 18, bottom + 24, kind))
    how = "compiled" if all(plan.compiled for plan in plans) else "not all compiled"
    seconds_of = best.origin_of_seconds
    note = f"{how}; {_assumption(best)}; seconds: {seconds_of}; grey does not fit; kinds below 1 % are not shown"
    document = (
        f"<!doctype html><meta charset=utf-8><title>Plan for {html.escape(machine.description)}</title>"
        "<style>body{font:14px system-ui,sans-serif;margin:2em}text{font-size:13px}</style>"
        f"<h2>{html.escape(machine.description)}</h2><p>{html.escape(note)}</p>"
        f'<svg width="1120" height="{bottom + 40}" xmlns="http://www.w3.org/2000/svg">{"".join(parts)}</svg>'
    )
    try:
        path.write_text(document, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html {path}: cannot be written ({error.strerror})") from None


@dataclass(frozen=True)
class _Axis:
    """An axis of bars that start at `left`, with `width` pixels for the largest value."""

    left: int
    width: int
    largest: float

    def at(self, value: float) -> float:
        return self.left + self.width * value / self.largest

    def bar(self, start: float, value: float, y: int, colour: str, title: str) -> str:
        return (
            f'<rect x="{self.at(start):.1f}" y="{y}" width="{self.width * value / self.largest:.1f}" height="18" '
            f'fill="{colour}"><title>{html.escape(title)}</title></rect>'
        )


def _worth_showing(plans: Sequence[Plan]) -> Callable[[Plan], dict[str, float]]:
    """Bytes by kind, without kinds that are always below a hundredth of the largest peak."""
    least = max(plan.peak for plan in plans) / 100

    def every(plan: Plan) -> dict[str, float]:
        return {**plan.arguments, "temporaries": plan.temporaries}

    kept = {kind for plan in plans for kind, nbytes in every(plan).items() if nbytes >= least}
    return lambda plan: {kind: nbytes for kind, nbytes in every(plan).items() if kind in kept}


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}">{html.escape(text)}</text>'
