"""Writes the page with the results of an experiment: results.md and its pictures in results/paper/."""

import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from flacuna_jax.config.files import load_config
from flacuna_jax.evaluation.plot import to_svg as bars
from flacuna_jax.evaluation.published import published_remarks
from flacuna_jax.evaluation.results import TaskResult
from flacuna_jax.evaluation.tables import Table, to_markdown
from flacuna_jax.logs.report import read_metrics
from flacuna_jax.paper import curves
from flacuna_jax.paper.experiment import (
    BASE,
    COLLECTIONS,
    Experiment,
    Losses,
    Training,
    delivered,
    held_out_losses,
    shares,
)
from flacuna_jax.paper.results import SIGNIFICANT, benchmark_tables, extra_tables, findings, read_results
from flacuna_jax.planning.calibration import describe_devices
from flacuna_jax.version import __version__
from flacuna_jax.whole_files import write_atomically

PAGE, PICTURES = "results.md", "results/paper"


def write_page(experiment: Experiment, losses: Losses, trainings: Sequence[Training]) -> Path:
    """Writes the page from the results and records of all stages, and returns its path."""
    directory = experiment.output / "page"
    shutil.rmtree(directory, ignore_errors=True)
    (directory / PICTURES).mkdir(parents=True)
    sections = [_head(experiment, losses, trainings), _data(experiment), _rates(experiment, losses)]
    if trainings:
        sections += [_training(experiment, trainings, directory), *_benchmarks(experiment, trainings, directory)]
    sections += [_peft(experiment, directory), _reproduce(experiment, trainings)]
    page = directory / PAGE
    write_atomically(page, "\n\n".join(section.strip() for section in sections if section.strip()) + "\n")
    return page


def publish(page: Path, directory: Path) -> None:
    """Copies the page and its pictures to a directory, in the place of earlier ones."""
    directory.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(directory / PICTURES, ignore_errors=True)
    shutil.copytree(page.parent / PICTURES, directory / PICTURES)
    shutil.copyfile(page, directory / PAGE)


def _head(experiment: Experiment, losses: Losses, trainings: Sequence[Training]) -> str:
    settings, left_out = experiment.settings, _left_out(experiment, losses, trainings)
    return f"""
# Results: the paper's experiment on a chat model of 135M parameters

`make paper` fine-tunes SmolLM2-135M-Instruct on a sample of FLAN-mini and runs the paper's benchmarks before and
after. This page is the output of `make paper BUDGET={settings.budget}`: {settings.examples:,} training records per run,
in rows of {settings.row_length} tokens. {left_out}Larger budgets were not run.

All numbers are of this model, this sample and these problems; they say nothing about Vicuna-13B and the whole
collection, whose published numbers are shown for context.
"""


def _left_out(experiment: Experiment, losses: Losses, trainings: Sequence[Training]) -> str:
    """The runs of this budget that are not finished."""
    finished = {run.name for run in trainings}
    missing = [f"`{run.name}`" for run in experiment.trainings(losses) if run.name not in finished]
    return f"Runs of it that are not finished, and left out: {', '.join(missing)}. " if missing else ""


def _data(experiment: Experiment) -> str:
    rows = []
    for name in COLLECTIONS:
        manifest = json.loads((experiment.collection(name) / "manifest.json").read_text("utf-8"))
        used = _used(experiment, name)
        for source in manifest["sources"]:
            there, tasks = source["records"], set(source["per_task"])
            trained = sum(count for task, count in used.items() if task in tasks)
            rows.append((source["name"], f"{source['read']:,}", f"{there:,}", f"{trained:,}", trained))
    total = sum(row[-1] for row in rows)
    lines = [f"| {name} | {read} | {there} | {trained} | {100 * count / total:.1f} % |"
             for name, read, there, trained, count in rows]  # fmt: skip
    table = _markdown(("source", "rows read", "records in the collection", "trained on", "share"), lines)
    return f"""
## Data

Sources are public sample data. They have no rows of the Flan 2021 and P3 submixes, of CodeContests and of ShareGPT, so
NIv2 and CoT stand for all task records (75.2 % in FLAN-mini), Code-Alpaca for most code records (16.4 %), and cleaned
Alpaca records for all chat records (8.4 %).

{table}

Overlap of the benchmarks' 8-grams of words with the records:

{_leakage(experiment)}
"""


def _used(experiment: Experiment, name: str) -> dict[str, int]:
    """Number of records of each task among those that a run of the methods trains on."""
    count = shares(experiment.settings.examples, experiment.settings.chat_share)[name]
    used: dict[str, int] = {}
    for line in experiment.records(name, "train").read_text("utf-8").split("\n")[:count]:
        task = json.loads(line)["source"]
        used[task] = used.get(task, 0) + 1
    return used


def _leakage(experiment: Experiment) -> str:
    """The tables of leakage in the reports of both collections, as one."""
    table: list[str] = []
    for name in COLLECTIONS:
        report = (experiment.collection(name) / "report.md").read_text("utf-8")
        part = report.partition("## Leakage")[2].partition("\n## ")[0]
        head, rule, *rows = [line for line in part.split("\n") if line.startswith("|")] or ["", ""]
        table = table or [f"| collection {head}", f"| --- {rule}"]
        table += [f"| {name} {row}" for row in rows]
    return "\n".join(table)


def _rates(experiment: Experiment, losses: Losses) -> str:
    lines, settings = [], experiment.settings
    at_the_end = []
    for method, by_rate in losses.items():
        best = min(by_rate, key=by_rate.__getitem__)
        if len(by_rate) > 1 and best in (min(by_rate), max(by_rate)):
            at_the_end.append(method)
        shown = [f"{rate:g}" if len(by_rate) == 1 else f"{rate:g}: {loss:.4f}" for rate, loss in by_rate.items()]
        chosen = list(by_rate).index(best)
        shown[chosen] = f"**{shown[chosen]}**"
        lines.append(f"| {method} | {', '.join(shown)} |")
    return f"""
## Learning rates

If a method has several learning rates, each was used on the first {settings.sweep_examples} records, and the one with
the lowest loss on {settings.held_out} held-out records was chosen. A method with one rate was not tuned.
{_beyond(at_the_end)}
{_markdown(("method", "learning rate: held-out loss at the end"), lines, "--")}
"""


def _beyond(methods: Sequence[str]) -> str:
    """A remark on methods whose best rate is the smallest or the largest that was tried."""
    if not methods:
        return ""
    return f"The best rate of {', '.join(methods)} is the smallest or largest one tried, so others may be better.\n"


def _training(experiment: Experiment, trainings: Sequence[Training], directory: Path) -> str:
    lines, drawn = [], {}
    for run in trainings:
        steps = _steps(run.directory)
        before, *_, after = held_out_losses(run.directory)
        record = experiment.stages.record(f"train-{run.name}")
        seconds = record.seconds if record is not None else 0.0
        tokens, supervised = (sum(step[name] for step in steps) for name in ("tokens", "supervised_tokens"))
        lines.append(
            f"| {run.name} | {run.chat_share:.1%} | {run.rate:g} | {len(steps)} | {tokens:,} | {supervised:,} | "
            f"{before:.4f} | {after:.4f} | {seconds / 60:.1f} |"
        )
        if run.name in experiment.settings.methods:
            drawn[run.name] = [step["loss"] for step in steps]
    write_atomically(directory / PICTURES / "training.svg", curves.to_svg("Training loss", drawn))
    head = ("run", "chat", "learning rate", "steps", "tokens", "with loss", "held-out loss before", "after", "minutes")
    return f"""
## Training

The configs are in `configs/paper_135m/`. `lora` is the paper's method: rank 8 on q_proj and v_proj. Runs that are not
named after a method are variants of one, described below.

{_markdown(head, lines)}

![Training loss of each step]({PICTURES}/training.svg)
"""


def _steps(run: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run / "metrics.jsonl") if "kind" not in record]


def _peft(experiment: Experiment, directory: Path) -> str:
    path = experiment.output / "peft" / "losses.json"
    if not path.is_file():
        return "## Beside PEFT\n\nThe comparison with PEFT was not run."
    found = json.loads(path.read_text("utf-8"))
    ours, theirs = found["ours"], found["peft"]
    drawn = curves.to_svg("Training loss, without dropout", {"flacuna_jax": ours, "PEFT": theirs}, dashed=("PEFT",))
    write_atomically(directory / PICTURES / "peft.svg", drawn)
    largest = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"""
## Beside PEFT

The first {len(ours)} steps of `{experiment.settings.peft.method if experiment.settings.peft else ""}`, from the same
initial adapter, with the same batches, order and schedule, in float32 and without dropout ({versions}). PEFT gets each
document alone, without packing. The largest difference of the losses is {largest:.1e}; the loss went from {ours[0]:.4f}
to {ours[-1]:.4f} here and from {theirs[0]:.4f} to {theirs[-1]:.4f} with PEFT.

![Training loss here and with PEFT]({PICTURES}/peft.svg)
"""


def _benchmarks(experiment: Experiment, trainings: Sequence[Training], directory: Path) -> list[str]:
    base = read_results(experiment, BASE)
    tuned = {run.name: read_results(experiment, run.name) for run in trainings}
    methods = [tuned[run.name] for run in trainings if run.name in experiment.settings.methods]
    tables = (*benchmark_tables([base, *methods]), *extra_tables([base, *methods]))
    return [
        "## Benchmarks",
        _findings(base, methods),
        *(_table(table, directory) for table in tables),
        "Remarks on the published numbers:\n\n" + "".join(f"- {remark}\n" for remark in published_remarks()),
        _questions(experiment, trainings, tuned),
    ]


def _findings(base: Sequence[TaskResult], methods: Sequence[Sequence[TaskResult]]) -> str:
    found, tested = findings(base, methods)
    listed = "\n".join(
        f"- {one.model}, {one.task} {one.shots}-shot, {one.score}: {one.text}, p = {one.p_value:.2g}" for one in found
    )
    expected = SIGNIFICANT * tested
    return f"""
Each tuned model was compared with the base on the same problems: {tested} differences. {len(found)} of them have
p < {SIGNIFICANT}; without any effect, {expected:.1f} would be expected, as p is not corrected for the number of
comparisons.

{listed}

A guess among the options is right for 25 % of the problems of MMLU, and for 50 % of those of HHH.
"""


def _table(table: Table, directory: Path) -> str:
    name = "-".join("".join(c if c.isalnum() else " " for c in table.title.lower()).split()) + ".svg"
    write_atomically(directory / PICTURES / name, bars(table))
    return f"{to_markdown(table)}\n![{table.title}]({PICTURES}/{name})"


def _questions(experiment: Experiment, trainings: Sequence[Training], tuned: Mapping[str, list[TaskResult]]) -> str:
    """A section for each question of the settings of which two runs are finished."""
    sections = []
    for title, names in experiment.settings.questions.items():
        compared = [run for name in names for run in trainings if run.name == name]
        if len(compared) < 2:
            continue
        models = [tuned[run.name] for run in compared]
        tables = [
            table for table in (*benchmark_tables(models), *extra_tables(models)) if "corrected" not in table.title
        ]
        listed = "\n".join(f"| {run.name} | {run.method} | {_difference(run)} |" for run in compared)
        body = "\n".join(to_markdown(_without_published(table)) for table in tables)
        sections.append(f"## {title}\n\n| run | method | data and options |\n|---|---|---|\n{listed}\n\n{body}")
    return "\n\n".join(sections)


def _difference(run: Training) -> str:
    """What distinguishes a run from others of its method."""
    few_shot = [] if run.few_shot is None else [f"{run.few_shot:.0%} of the task records with worked examples"]
    return ", ".join([f"{run.chat_share:.1%} chat records", *few_shot, *(f"`{option}`" for option in run.options)])


def _without_published(table: Table) -> Table:
    return Table(table.title, table.columns, tuple(row for row in table.rows if row.kind != "published"), table.notes)


def _reproduce(experiment: Experiment, trainings: Sequence[Training]) -> str:
    settings = experiment.settings
    digests = []
    for name in COLLECTIONS:
        record = experiment.stages.record(f"data-{name}")
        digests += [(f"data, {name}", value) for value in (record.outputs.values() if record else ())]
    for run in trainings:
        record = experiment.stages.record(f"train-{run.name}")
        path = str(delivered(run, settings))
        digests.append((run.name, record.outputs.get(path, "") if record else ""))
    lines = [f"| {name} | `{value}` |" for name, value in digests]
    seconds = sum(record.seconds for record in experiment.stages.records())
    dtypes = {load_config(run.directory / "config.yaml").model.dtype for run in trainings}
    computed = f" Training computed in {' and '.join(sorted(dtypes))}." if dtypes else ""
    return f"""
## How to repeat this

```
make paper BUDGET={settings.budget}
```

Seed {settings.seed}; flacuna_jax {__version__}, jax {jax.__version__}, Python {platform.python_version()},
{describe_devices(jax.devices())}.{computed} All stages together took {seconds / 60:.0f} minutes; other programs on the
machine make this longer. The records of the stages, with each command, are in
`{Path(settings.output_dir).name}/stages/`. A test runs a tiny experiment twice and compares every byte of its adapters
and results (`tests/paper/test_experiment.py`); other processors and versions of jax may round differently.

{_markdown(("file", "SHA-256"), lines, "--")}
"""


def _markdown(header: Sequence[str], lines: Sequence[str], align: str = "") -> str:
    """A table of finished lines; columns after the first are right-aligned unless `align` is "--"."""
    rule = "|---|" + ("---|" if align else "---:|") * (len(header) - 1)
    return "\n".join(["| " + " | ".join(header) + " |", rule, *lines])
