"""Facts about a run for its model card: settings, number of steps and loss, evaluation results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flacuna_jax.config.run import RunConfig
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.card import Facts, Measured
from flacuna_jax.huggingface.files.json_file import read_json
from flacuna_jax.logs.report import read_metrics

EVALUATION = "evaluation"
HARNESS_FILE = "lm_eval.json"
"""Written by `flacuna evaluate --protocol lm_eval` for each model."""


def setting_rows(config: RunConfig) -> dict[str, str]:
    """The settings that affect the weights, by label."""
    training, data = config.training, config.data
    length = f"{training.epochs} epoch" + ("s" if training.epochs > 1 else "")
    if training.max_steps is not None:
        length += f" or {training.max_steps:,} steps, whichever is first"
    warmup = f"{training.warmup_steps} warm-up steps"
    if training.warmup_ratio:
        warmup = f"warm-up in the first {100 * training.warmup_ratio:g} % of the steps"
    objective = training.objective
    settings = {} if objective is None else objective.model_dump(mode="json")
    return {
        **({"objective": ", ".join(f"{name} {value}" for name, value in settings.items())} if settings else {}),
        "data": ", ".join(source.path for source in data.sources),
        "template": data.template,
        "loss on": f"{data.train_on} tokens, examples of at most {data.max_length} tokens",
        "length": length,
        "batch": f"{training.batch_size} {training.batch_unit}",
        "learning rate": f"{training.learning_rate:g}, {training.schedule}, {warmup}",
        "seed": str(config.seed),
    }


def run_facts(run: Path, config: RunConfig, results: Path | None) -> Facts:
    """Settings, course of training, and evaluation results of a run directory.

    Args:
      results: a directory of `flacuna evaluate --output`, or its subdirectory for one model; None looks for
        `evaluation/` in the run.

    Raises:
      UserError: `results` is given and contains no results.
    """
    rows = setting_rows(config) | _course(run)
    place = run / EVALUATION if results is None else results
    measured = [*_measured(place), *_measured_by_harness(place)]
    if results is not None and not measured:
        raise UserError(f"{results} has no results of `flacuna evaluate` (MODEL/TASK-SHOTSshot.json, lm_eval.json)")
    return Facts(rows, measured)


def _course(run: Path) -> dict[str, str]:
    """Number of steps and training loss from metrics.jsonl; empty if the file is missing."""
    path = run / "metrics.jsonl"
    steps = [record for record in read_metrics(path) if "step" in record and record.get("loss") is not None]
    if not steps:
        return {}
    first, last = steps[0], steps[-1]
    at_the_end = last["loss"] if last.get("mean_loss") is None else last["mean_loss"]
    return {"optimizer steps": f"{last['step']:,}", "training loss": f"{first['loss']:.4f} → {at_the_end:.4f}"}


def _measured(directory: Path) -> Sequence[Measured]:
    files = sorted({*directory.glob("*shot.json"), *directory.glob("*/*shot.json")})
    models = {file.parent for file in files}
    return [
        Measured(
            _benchmark(f"{content['task']}, {content['shots']} shots", file, len(models) > 1),
            score,
            _value(summary),
            content["summary"]["problems"],
        )
        for file in files
        for content in [read_json(file)]
        for score, summary in content.get("summary", {}).items()
        if isinstance(summary, dict) and "mean" in summary
    ]


def _measured_by_harness(directory: Path) -> Sequence[Measured]:
    """Results of `--protocol lm_eval`: the harness's own numbers, mostly fractions of 1, and standard errors."""
    files = sorted({*directory.glob(HARNESS_FILE), *directory.glob(f"*/{HARNESS_FILE}")})
    measured = []
    for file in files:
        content = read_json(file)
        counts, shots = content.get("n-samples") or {}, content.get("n-shot") or {}
        for task, scores in content.get("results", {}).items():
            name = task if task not in shots else f"{task}, {shots[task]} shots"
            benchmark = _benchmark(f"{name}, lm_eval", file, len(files) > 1)
            problems = counts.get(task, {}).get("effective")
            measured += [Measured(benchmark, *score, problems) for score in _harness_scores(scores)]
    return measured


def _harness_scores(scores: Mapping[str, Any]) -> Sequence[tuple[str, str]]:
    """(metric, value) of a task; the harness calls them "metric,filter" and "metric_stderr,filter"."""
    found = []
    for name, value in scores.items():
        metric, _, answers = name.partition(",")
        if not answers or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = scores.get(f"{metric}_stderr,{answers}")
        spread = f" ± {error:.4f}" if isinstance(error, int | float) else ""
        found.append((metric if answers == "none" else f"{metric} ({answers})", f"{value:.4f}{spread}"))
    return found


def _benchmark(name: str, file: Path, several: bool) -> str:
    return f"{name} ({file.parent.name})" if several else name


def _value(summary: dict) -> str:
    low, high = summary["interval"]
    return f"{summary['mean']:.2f} [{low:.2f}, {high:.2f}]"
