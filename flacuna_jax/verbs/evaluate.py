"""Evaluates models on benchmarks and writes results and tables."""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from flacuna_jax.data.conversation import Template
from flacuna_jax.errors import UserError
from flacuna_jax.evaluation.benchmark import Benchmark, Options, Reading
from flacuna_jax.evaluation.cache import CachedModel, Store
from flacuna_jax.evaluation.judge import Judge, ModelJudge, ServerJudge
from flacuna_jax.evaluation.plot import to_svg
from flacuna_jax.evaluation.published import published_remarks, published_rows
from flacuna_jax.evaluation.registry import BENCHMARKS
from flacuna_jax.evaluation.results import TaskResult, write_result
from flacuna_jax.evaluation.settings import SETTINGS
from flacuna_jax.evaluation.statistics import confidence_interval
from flacuna_jax.evaluation.suite import named_tasks
from flacuna_jax.evaluation.tables import all_differences, make_tables, to_latex, to_markdown
from flacuna_jax.generation.settings import Placement
from flacuna_jax.inference import (
    ModelAddress,
    ModelLoader,
    addressed_model,
    template_of,
)
from flacuna_jax.say import say_on_stderr
from flacuna_jax.whole_files import write_atomically


def run(arguments: argparse.Namespace) -> None:
    addresses = _addresses(arguments)
    output = Path(arguments.output)
    _create(output)
    if arguments.protocol == "lm_eval":
        _harness(arguments, addresses, output)
        return
    options = _options(arguments, addresses, output)
    # Every benchmark is read and checked before a model is loaded.
    tasks = [(task, task.load(Path(arguments.data), options)) for task in named_tasks(arguments.tasks.split(","))]
    loader = _loader(arguments)
    everything: list[list[TaskResult]] = []
    for address, name in addresses:
        results: list[TaskResult] = []
        with _cached(loader, address, name, output) as model:
            for task, run in tasks:
                print(f"{name}: {task}", file=sys.stderr)
                for result in run(model):
                    _write(result, task.benchmark, output)
                    results.append(result)
        everything.append(results)
    _report(everything, output, published=not arguments.no_published)


def _create(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be created: {error.strerror}") from None


def _loader(arguments: argparse.Namespace) -> ModelLoader:
    return ModelLoader(arguments.dtype, placement=Placement(rows=arguments.rows), stored_base=arguments.stored_base)


def _addresses(arguments: argparse.Namespace) -> list[tuple[ModelAddress, str]]:
    """Models and their names, those of --compare first. `--compare base` is the model without its adapter."""
    main_address, _ = addressed_model(arguments)
    others = []
    for text in arguments.compare:
        if text == "base" and main_address.adapter is None:
            raise UserError("--compare base: the model has no adapter, so it is its own base")
        others.append(ModelAddress(main_address.base) if text == "base" else ModelAddress.parse(text))
    named = [(address, address.name) for address in others]
    named.append((main_address, arguments.name or main_address.name))
    names = [name for _, name in named]
    if len(set(names)) < len(names):
        raise UserError(f"two models have the same name ({', '.join(names)}); choose another one with --name")
    return named


def _options(arguments: argparse.Namespace, addresses: list[tuple[ModelAddress, str]], output: Path) -> Options:
    return Options(
        limit=arguments.limit,
        allow_code_execution=arguments.allow_code_execution,
        judge=functools.cache(lambda: _judge(arguments, output)),
        templates=functools.cache(lambda: {name: _template(arguments, address) for address, name in addresses}),
        settings={setting: getattr(arguments, setting.name) for setting in SETTINGS},
    )


def _template(arguments: argparse.Namespace, address: ModelAddress) -> Template | None:
    """The template for one model, with the special tokens of its tokenizer; None for raw text."""
    return None if arguments.template == "none" else template_of(address, arguments.template, None, say_on_stderr)


def _judge(arguments: argparse.Namespace, output: Path) -> Judge | None:
    if arguments.judge_url:
        if not arguments.judge_model:
            raise UserError("--judge-url needs --judge-model: the name of the judge on the server")
        key = os.environ.get(arguments.judge_key_variable)
        return ServerJudge(arguments.judge_url, arguments.judge_model, Store(output / "judge.jsonl"), key)
    if arguments.judge_model:
        address = ModelAddress.parse(arguments.judge_model)
        store = Store(output / "cache" / "judge-model.jsonl")
        model = CachedModel(ModelLoader(arguments.dtype).load(address), store)
        return ModelJudge(model, template_of(address, None, None, say_on_stderr))
    return None


@contextlib.contextmanager
def _cached(loader: ModelLoader, address: ModelAddress, name: str, output: Path) -> Iterator[CachedModel]:
    model = loader.load(address, name)
    store = Store(output / "cache" / f"{model.fingerprint[:16]}.jsonl")

    def show(done: int, total: int) -> None:
        print(f"  {done} of {total}", end="\r" if done < total else "\n", file=sys.stderr, flush=True)

    with contextlib.closing(store):
        yield CachedModel(model, store, show, long_chunk=4 * model.placement.rows)


def _write(result: TaskResult, benchmark: Benchmark, output: Path) -> None:
    summary: dict[str, Any] = {"problems": len(result.outcomes), "complete": result.complete}
    for score in result.score_names:
        interval = confidence_interval(result, score)
        groups = result.by_group(score)
        summary[score] = {"mean": result.mean(score), "interval": [interval.low, interval.high], "groups": groups}
        summary[score] |= {name: result.by_group(score, larger) for name, larger in benchmark.groupings.items()}
    path = output / _safe(result.model) / f"{result.task}-{result.shots}shot.json"
    write_result(result, path, summary)


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "+-._" else "_" for c in name)


def _file_name(title: str) -> str:
    """Letters and digits of a title: few-shot-faithful for "Few-shot (faithful)"."""
    return "-".join(re.findall(r"[a-z0-9-]+", title.lower()))


def _report(everything: Sequence[Sequence[TaskResult]], output: Path, published: bool) -> None:
    rows = published_rows() if published else ()
    columns = [column for benchmark in BENCHMARKS for column in benchmark.columns]
    tables = [table for reading in get_args(Reading) for table in make_tables(everything, columns, rows, reading)]
    markdown = "\n".join(to_markdown(table) for table in tables)
    if published:
        markdown += "\nPublished rows:\n\n" + "".join(f"- {remark}\n" for remark in published_remarks())
    write_atomically(output / "tables.md", markdown)
    write_atomically(output / "tables.tex", "\n".join(to_latex(table) for table in tables))
    for table in tables:
        write_atomically(output / f"{_file_name(table.title)}.svg", to_svg(table))
    compared = [
        {
            "base": everything[0][0].model,
            "model": results[0].model,
            "differences": [
                {"task": task, "shots": shots, "score": score, **dataclasses.asdict(found)}
                for (task, shots, score), found in all_differences(everything[0], results).items()
            ],
        }
        for results in everything[1:]
    ]
    write_atomically(output / "differences.json", json.dumps(compared, indent=1))
    print(markdown)
    print(f"every prompt, prediction and score: {output}")


def _harness(arguments: argparse.Namespace, addresses: list[tuple[ModelAddress, str]], output: Path) -> None:
    from flacuna_jax.evaluation import harness  # the harness is an optional dependency

    loader, data = _loader(arguments), Path(arguments.data)
    tasks = [task.strip() for task in arguments.tasks.split(",")]
    harness.check_tasks(tasks, data)
    for address, name in addresses:
        template = _template(arguments, address)
        with _cached(loader, address, name, output) as model:
            results = harness.run_tasks(
                model,
                tasks,
                template=template,
                apply_chat_template=template is not None,
                add_bos=arguments.add_bos,
                shots=arguments.shots,
                limit=arguments.limit,
                include=data,
            )
        text = json.dumps(results, default=str, indent=1, ensure_ascii=False)
        write_atomically(output / _safe(name) / "lm_eval.json", text)
        for metric, value in harness.metrics(results).items():
            print(f"{name}  {metric}  {value:.4f}")
