"""Writes report.html: settings, curves and results of a run in one file that needs no network and no other files."""

import datetime
import itertools
import json
import math
import platform
import re
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from html import escape
from importlib import metadata
from pathlib import Path
from string import Template
from typing import Any

import jax

from flacuna_jax.data.report import DataReport
from flacuna_jax.logs.metrics import TrainRecord
from flacuna_jax.storage.run_directory import json_object
from flacuna_jax.training.history import RECENT_STEPS
from flacuna_jax.version import __version__
from flacuna_jax.whole_files import write_atomically

Row = Mapping[str, Any]

# Chart size in SVG units; the margins contain the tick labels.
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 250, 58, 26, 12, 28
# Limits the number of points to about the columns of a screen; each bucket keeps its extremes, so spikes are visible.
_BUCKETS = 400
# A share or a change, which is aligned in columns like a number.
_NUMBERS = re.compile(r"[\d.,]+ %|[\d.,]+%? → [\d.,]+%?")


def write_report(
    path: Path,
    *,
    title: str,
    records: Sequence[Row],
    facts: Mapping[str, str],
    mixture: Sequence[Row],
    config_yaml: str,
    environment: Mapping[str, str],
    samples: Sequence[Row] = (),
    status: str = "finished",
    total_steps: int | None = None,
) -> None:
    """Writes the report of a run, at its end or while it runs.

    Args:
      path: report.html.
      title: the run's name.
      records: the lines of metrics.jsonl; training steps and evaluations are drawn.
      facts: label → value pairs of the plan (rows, parameters, devices, ...).
      mixture: a row per data source, all with the same keys, from `mixture_rows`.
      config_yaml: the resolved config.
      environment: see `environment`.
      samples: the lines of samples.jsonl; the first and last answer to each question are shown side by side.
      status: status of the run; with "running", the page reloads itself and shows the time left.
      total_steps: number of steps of the whole run.

    Raises:
      UserError: the file cannot be written.
    """
    steps = [record for record in records if "kind" not in record and "loss" in record]
    evaluations = [record for record in records if record.get("kind") == "evaluation"]
    hooks = [record for record in records if record.get("kind") == "hook"]
    tasks = dict.fromkeys(key for record in evaluations for key in record if key.startswith("tasks/"))
    scalars = dict.fromkeys(key for record in steps for key in record if key not in TrainRecord.names())
    unit = "examples" if any(name.startswith("rewards/") for name in scalars) else "supervised tokens"
    curves = (
        _chart(steps, "loss", "Loss", f"mean over a step's {unit}", smooth=True),
        _chart(steps, "learning_rate", "Learning rate", ""),
        _chart(steps, "grad_norm", "Gradient norm", "before clipping", smooth=True),
        _chart(steps, "supervised_tokens_per_second", "Throughput", "supervised tokens per second", smooth=True),
        _chart(evaluations, "eval/loss", "Held-out loss", f"mean over {unit}"),
        _chart(evaluations, "eval/token_accuracy", "Held-out token accuracy", "share of correct tokens"),
        *(_chart(evaluations, f"eval/{name}", escape(f"Held-out {name}"), "") for name in scalars),
        *(_chart(evaluations, task, task.removeprefix("tasks/"), "benchmark") for task in tasks),
        _curves_by_name(steps, without=TrainRecord.names()),
        _curves_by_name(hooks),
    )
    page = _PAGE.substitute(
        title=escape(title),
        subtitle=escape(f"{status} · flacuna_jax {environment.get('flacuna_jax', __version__)}"),
        refresh="<meta http-equiv=refresh content=60>" if status == "running" else "",
        tiles="".join(
            f"<div class=tile><span>{escape(label)}</span><b>{escape(value)}</b></div>"
            for label, value in _summary(steps, evaluations, total_steps, status == "running").items()
        ),
        plan=_table([{"": label, "value": value} for label, value in facts.items()], header=False),
        charts="".join(curves) or "<p>No step was logged.</p>",
        mixture=_table(mixture),
        held_out=_section("Held-out records by source", _table(_by_source(evaluations))) if evaluations else "",
        samples=_section("Answers, before and after", _table(_before_and_after(samples), style="even"))
        if samples
        else "",
        config=escape(config_yaml),
        environment=_table([{"": name, "value": value} for name, value in environment.items()], header=False),
    )
    write_atomically(path, page)


def _curves_by_name(records: Sequence[Row], without: Collection[str] = ()) -> str:
    """A chart of each number in the records, except for the names in `without`."""
    names = {name: None for record in records for name, value in record.items() if isinstance(value, int | float)}
    drawn = (name for name in names if name not in ("step", *without))
    return "".join(_chart(records, name, escape(name), "", smooth=True) for name in drawn)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl or samples.jsonl; empty if the file does not exist. Ignores incomplete lines,
    which are still being written, and invalid lines, which the next start of the run removes."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [record for record in map(json_object, lines) if record is not None]


def mixture_rows(report: DataReport) -> list[Row]:
    """The data mixture as table rows: counts of kept and dropped records per source."""
    return [
        {
            "source": Path(source.path).name,
            "read": source.read,
            "kept": source.kept,
            "dropped": ", ".join(f"{count:,} {reason}" for reason, count in source.dropped.most_common()) or "none",
            "tokens": source.tokens,
            "supervised": source.supervised_tokens,
            "share of supervised": f"{100 * source.supervised_tokens / max(1, report.supervised_tokens):.1f} %",
        }
        for source in report.sources
    ]


def environment() -> dict[str, str]:
    """Versions and devices of this process; nothing from its environment variables."""
    devices = jax.devices()
    kinds = ", ".join(
        f"{sum(device.device_kind == kind for device in devices)} × {kind}"
        for kind in dict.fromkeys(device.device_kind for device in devices)
    )
    packages = {
        name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    }
    return {
        "devices": f"{kinds} ({jax.default_backend()}), {jax.process_count()} host(s)",
        "flacuna_jax": __version__,
        "python": platform.python_version(),
        **packages,
        "system": platform.platform(),
    }


def _summary(
    steps: Sequence[Row], evaluations: Sequence[Row], total_steps: int | None, running: bool
) -> dict[str, str]:
    if not steps:
        return {}
    losses, means, rates, peaks = (
        [record[key] for record in steps if record.get(key) is not None]
        for key in ("loss", "mean_loss", "supervised_tokens_per_second", "peak_memory_bytes")
    )
    done = steps[-1]["step"]
    summary = {"steps done": f"{done:,}" + (f" of {total_steps:,}" if total_steps and total_steps > done else "")}
    paces = [record["seconds_per_step"] for record in steps if record.get("seconds_per_step") is not None]
    if running and paces and total_steps:
        left = statistics.median(paces[-10:]) * max(0, total_steps - done)
        summary["time left, at this pace"] = str(datetime.timedelta(seconds=round(left)))
    if losses and means:
        summary[f"loss, first step → last {RECENT_STEPS}"] = f"{losses[0]:.3f} → {means[-1]:.3f}"
    if held_out := [record["eval/loss"] for record in evaluations if record.get("eval/loss") is not None]:
        then = f" → {min(held_out[1:]):.3f}" if held_out[1:] else ""
        summary["held-out loss" + (", first → best" if then else "")] = f"{held_out[0]:.3f}{then}"
    if rates:
        summary["supervised tokens/s"] = f"{statistics.median(rates):,.0f}"
    if fills := [record["fill"] for record in steps if record.get("fill") is not None]:
        summary["fill"] = f"{100 * _mean(fills):.1f} %"
    if shares := [record["mfu"] for record in steps if record.get("mfu") is not None]:
        summary["MFU"] = f"{100 * statistics.median(shares):.1f} %"
    if peaks:
        summary["peak memory"] = f"{max(peaks) / 2**30:.1f} GiB"
    if skipped := steps[-1].get("skipped"):
        summary["bad steps, red in curves"] = f"{skipped:,}"
    return summary


def _by_source(evaluations: Sequence[Row]) -> list[Row]:
    """First and last evaluation, for all held-out records and for each source."""
    if not evaluations or "eval/loss" not in evaluations[-1]:
        return []
    first, last = evaluations[0], evaluations[-1]
    suffixes = [key.removeprefix("eval/loss") for key in last if key.startswith("eval/loss")]

    def change(key: str, form: str) -> str:
        before = format(first[key], form) if isinstance(first.get(key), float) else "–"
        return f"{before} → {format(last[key], form)}" if isinstance(last.get(key), float) else before

    counts = {name: title for name, title in _COUNTS.items() if f"eval/{name}" in last}
    measured = {name: form for name, form in _MEASURES.items() if f"eval/{name}" in last}
    return [
        {
            "source": suffix.removeprefix("/") or "all",
            **{title: last[f"eval/{name}{suffix}"] for name, title in counts.items()},
            **{_titled(name): change(f"eval/{name}{suffix}", form) for name, form in measured.items()},
        }
        for suffix in suffixes
    ]


_COUNTS = {"tokens": "supervised tokens", "pairs": "pairs", "examples": "examples"}
"""What an evaluation counts → its title in the table."""
_MEASURES = {
    "loss": ".4f",
    "perplexity": ".2f",
    "token_accuracy": ".1%",
    "rewards/accuracy": ".1%",
    "rewards/margin": ".3f",
}
"""Measures in the table by source, with their formats."""


def _titled(name: str) -> str:
    return name.replace("rewards/", "reward ").replace("_", " ")


def _before_and_after(samples: Sequence[Row]) -> list[Row]:
    by_id: dict[Any, list[Row]] = {}
    for sample in samples:
        by_id.setdefault((sample["id"], sample["question"]), []).append(sample)
    first, last = (min(s["step"] for s in samples), max(s["step"] for s in samples))
    return [
        {
            "question": answers[0]["question"].strip(),
            f"after step {first}": answers[0]["answer"].strip(),
            **({f"after step {last}": answers[-1]["answer"].strip()} if last > first else {}),
            "expected": (answers[0]["expected"] or "").strip(),
        }
        for answers in by_id.values()
    ]


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>{content}"


def _chart(records: Sequence[Row], key: str, title: str, note: str, smooth: bool = False) -> str:
    bad = _bad_steps(records)
    points = [
        (float(r["step"]), float(r[key]))
        for r in records
        if r.get(key) is not None and not (smooth and r["step"] in bad)
    ]
    if not points:
        return ""
    points *= 2 if len(points) == 1 else 1  # a line through the same point twice is drawn as a dot
    shown = _thinned(points)
    x_ticks = _ticks(min(x for x, _ in points), max(x for x, _ in points), intervals=6, whole=True)
    y_ticks = _ticks(min(y for _, y in points), max(y for _, y in points))
    x_low, x_high = points[0][0], max(points[-1][0], points[0][0] + 1)
    y_low, y_high = min(y_ticks[0], *(y for _, y in points)), max(y_ticks[-1], *(y for _, y in points))

    def at_x(x: float) -> float:
        return _LEFT + (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)

    def at_y(y: float) -> float:
        return _HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)

    grid = "".join(
        f"<line class=grid x1={_LEFT} x2={_WIDTH - _RIGHT} y1={at_y(y):.1f} y2={at_y(y):.1f} />"
        f"<text x={_LEFT - 8} y={at_y(y) + 4:.1f} text-anchor=end>{_number(y)}</text>"
        for y in y_ticks
    ) + "".join(
        f"<text x={at_x(x):.1f} y={_HEIGHT - 8} text-anchor=middle>{x:,.0f}</text>"
        for x in x_ticks
        if x_low <= x <= x_high
    )
    lines = "".join(
        f"<line class=bad x1={at_x(step):.1f} x2={at_x(step):.1f} y1={_TOP} y2={_HEIGHT - _BOTTOM} />"
        for step in sorted(bad)[:_BUCKETS]
        if smooth and x_low <= step <= x_high
    )
    lines += _line(shown, at_x, at_y, "raw" if smooth else "main")
    if smooth:
        lines += _line(_thinned(_smoothed(points)), at_x, at_y, "main")
    data = escape(json.dumps([[x, _number(y), round(at_x(x), 1), round(at_y(y), 1)] for x, y in shown]), quote=True)
    return (
        f"<figure><figcaption>{escape(title)} <small>{escape(note)}</small><output></output></figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role=img aria-label="{escape(title)}" data-points="{data}">'
        f"{grid}{lines}<g class=mark visibility=hidden><line y1={_TOP} y2={_HEIGHT - _BOTTOM} /><circle r=3.5 /></g>"
        "</svg></figure>"
    )


def _bad_steps(records: Sequence[Row]) -> set[int]:
    """Bad steps. They are marked instead of drawn, because their values would distort the curve."""
    counted = [0, *(record.get("skipped") or 0 for record in records)]
    return {
        record["step"] for record, before, after in zip(records, counted, counted[1:], strict=False) if after > before
    }


def _line(
    points: Iterable[tuple[float, float]], at_x: Callable[[float], float], at_y: Callable[[float], float], style: str
) -> str:
    return f'<polyline class={style} points="{" ".join(f"{at_x(x):.1f},{at_y(y):.1f}" for x, y in points)}" />'


def _smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Centred moving average over a thirtieth of the run, which has no lag."""
    reach = len(points) // 60
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    smoothed = []
    for index, (x, _) in enumerate(points):
        first, end = max(0, index - reach), min(len(points), index + reach + 1)
        smoothed.append((x, (sums[end] - sums[first]) / (end - first)))
    return smoothed


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= 2 * _BUCKETS:
        return list(points)
    size = math.ceil(len(points) / _BUCKETS)
    buckets = (points[start : start + size] for start in range(0, len(points), size))
    extremes = [{min(b, key=lambda p: p[1]), max(b, key=lambda p: p[1])} for b in buckets]
    return [point for pair in extremes for point in sorted(pair)]


def _ticks(low: float, high: float, intervals: int = 4, whole: bool = False) -> list[float]:
    """Round numbers that enclose [low, high], with about `intervals` intervals."""
    span = (high - low) or abs(high) or 1.0
    rough = span / intervals
    magnitude = 10.0 ** math.floor(math.log10(rough))
    interval = next(m * magnitude for m in (1, 2, 2.5, 5, 10) if m * magnitude >= 0.999 * rough)
    interval = max(1.0, round(interval)) if whole else interval
    first, last = math.floor(low / interval + 1e-6), math.ceil(high / interval - 1e-6)
    return [index * interval for index in range(first, max(last, first + 1) + 1)]


def _number(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{float(f'{value:.4g}'):g}"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _table(rows: Sequence[Row], header: bool = True, style: str = "") -> str:
    if not rows:
        return "<p>None recorded.</p>"

    def cell(tag: str, text: str, beside: Any, column: str = "") -> str:
        number = isinstance(beside, int | float) or _NUMBERS.fullmatch(str(beside))
        label = f' data-column="{escape(column)}"' if column else ""
        return f"<{tag}{' class=n' if number else ''}{label}>{escape(text)}</{tag}>"

    head = "".join(cell("th", key, value) for key, value in rows[0].items())
    body = "".join(
        "<tr>"
        + "".join(
            cell("td", f"{value:,}" if isinstance(value, int) else str(value), value, column if style else "")
            for column, value in row.items()
        )
        + "</tr>"
        for row in rows
    )
    opened = f"<table class={style}>" if style else "<table>"
    return f"<div class=scroll>{opened}{f'<tr>{head}</tr>' if header else ''}{body}</table></div>"


_PAGE = Template("""<!doctype html>
<html lang=en><meta charset=utf-8>$refresh<meta name=viewport content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --ink: light-dark(#1c2330, #e6e9ef); --dim: light-dark(#667085, #98a2b3);
  --page: light-dark(#f6f7f9, #12151b); --card: light-dark(#fff, #1b2029); --rule: light-dark(#e4e7ec, #2c3340);
  --main: light-dark(#2b5fd9, #7ea6ff); --bad: light-dark(#d92d20, #f97066); }
body { margin: 0 auto; padding: 40px 24px 64px; max-width: 1160px; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 28px; letter-spacing: -.02em; } h2 { margin: 40px 0 12px; font-size: 17px; }
header p, small, .tile span, th { color: var(--dim); } header p { margin: 2px 0 24px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
.tile, figure, .scroll, pre { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; }
.tile { padding: 12px 14px; } .tile span { display: block; font-size: 12.5px; }
.tile b { font-size: 16px; white-space: nowrap; font-weight: 600; font-variant-numeric: tabular-nums; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 16px; }
figure { margin: 0; padding: 14px 16px 8px; } figcaption { font-weight: 600; } small { font-weight: 400; }
output { float: right; font-weight: 400; font-variant-numeric: tabular-nums; color: var(--main); }
svg { display: block; width: 100%; margin-top: 6px; } svg text { font-size: 11.5px; fill: var(--dim); }
polyline { fill: none; stroke: var(--main); stroke-linejoin: round; stroke-linecap: round;
  vector-effect: non-scaling-stroke; }
.main { stroke-width: 2; } .raw { stroke-width: 1; opacity: .35; } .grid { stroke: var(--rule); }
.bad { stroke: var(--bad); stroke-width: 1; opacity: .6; vector-effect: non-scaling-stroke; }
.mark line { stroke: var(--dim); stroke-dasharray: 3 3; } .mark circle { fill: var(--main); }
.scroll { overflow-x: auto; padding: 4px 0; } table { border-collapse: collapse; width: 100%; }
th, td { padding: 7px 16px; text-align: left; vertical-align: top; }
.even { table-layout: fixed; } td { white-space: pre-wrap; overflow-wrap: break-word; }
.even td { overflow-wrap: anywhere; } th { font-weight: 500; font-size: 13px; }
tr + tr td { border-top: 1px solid var(--rule); }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
@media (max-width: 720px) {
  body { padding: 24px 12px 48px; } th, td { padding: 6px 10px; }
  .even tr:first-child { display: none; } .even :is(tbody, tr, td) { display: block; }
  .even tr + tr { border-top: 1px solid var(--rule); padding: 6px 0; }
  .even tr + tr td { border: 0; padding: 3px 10px; }
  .even td:empty { display: none; }
  .even td::before { content: attr(data-column); display: block; font-size: 12.5px; color: var(--dim); }
}
pre { padding: 16px; overflow-x: auto; font: 13px/1.5 ui-monospace, monospace; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 0 16px;
  align-items: start; } .two pre { margin: 0; }
</style>
<header><h1>$title</h1><p>$subtitle</p></header>
<div class=tiles>$tiles</div>
<h2>Plan</h2>$plan
<h2>Curves</h2><div class=charts>$charts</div>
$held_out
$samples
<h2>Data</h2>$mixture
<div class=two><section><h2>Settings</h2><pre>$config</pre></section>
<section><h2>Environment</h2>$environment</section></div>
<script>
for (const svg of document.querySelectorAll("svg")) {
  const points = JSON.parse(svg.dataset.points), mark = svg.querySelector(".mark");
  const out = svg.parentElement.querySelector("output");
  svg.onmousemove = event => {
    const x = new DOMPoint(event.clientX, 0).matrixTransform(svg.getScreenCTM().inverse()).x;
    const near = points.reduce((a, b) => Math.abs(b[2] - x) < Math.abs(a[2] - x) ? b : a);
    mark.setAttribute("transform", `translate($${near[2]} 0)`);
    mark.querySelector("circle").setAttribute("cy", near[3]);
    mark.setAttribute("visibility", "visible");
    out.textContent = `step $${near[0].toLocaleString("en")}: $${near[1]}`;
  };
  svg.onmouseleave = () => { mark.setAttribute("visibility", "hidden"); out.textContent = ""; };
}
</script></html>
""")
