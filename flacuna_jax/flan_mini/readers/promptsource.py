"""promptsource: templates.yaml files (Jinja, "input ||| target"), applied to rows of their datasets.

Rows are below the source's path in the directory of their dataset, `<dataset>[/<subset>]/...{json,jsonl,parquet}`, and
templates in the same directory below `templates`. A row gives one item per template, except for templates
without a target for the row (for example because a test row has label -1). Templates run in Jinja's immutable sandbox:
they are data.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import yaml
from jinja2.sandbox import ImmutableSandboxedEnvironment

from flacuna_jax.data.formats import BadRecord
from flacuna_jax.data.report import BadRecordPolicy
from flacuna_jax.errors import UserError
from flacuna_jax.flan_mini.config import MixtureSource
from flacuna_jax.flan_mini.items import PAIR, Item, hash64
from flacuna_jax.flan_mini.readers.common import Items, Reader, Unusable, attempt, find_training, raw_records
from flacuna_jax.flan_mini.readers.task_rows import all_columns

FILE = "templates.yaml"
_BAR = "|||"
_HIDDEN_BAR = "\ue000bar\ue000"
"""Replaces ||| in the text of a row while the rendered template is split at |||."""


class _Loader(yaml.SafeLoader):
    """Reads !Template and !TemplateMetadata as plain mappings."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> Any:
    return loader.construct_mapping(node, deep=True)


for _tag in ("!Template", "!TemplateMetadata"):
    _Loader.add_constructor(_tag, _mapping)


@dataclass(frozen=True)
class PromptTemplate:
    """A named Jinja template and optionally the template of its answer choices."""

    task: str
    prompt: jinja2.Template
    choices: jinja2.Template | None

    def render(self, row: Mapping[str, Any]) -> tuple[str, str] | None:
        """(input, target) for a row whose ||| are replaced; None if the template has no target for it.

        Raises jinja2.TemplateError.
        """
        values = dict(row)
        pick = _Pick(self.task, row)
        if self.choices is not None:
            # A row has no ||| here (they are replaced), so every ||| separates choices.
            values["answer_choices"] = [part.strip() for part in self.choices.render(**values).split(_BAR)]
        rendered = self.prompt.render(**values, choice=pick)
        parts = [part.replace(_HIDDEN_BAR, _BAR).strip() for part in rendered.split(_BAR)]
        return (parts[0], parts[1]) if len(parts) == 2 and all(parts) else None


class _Pick:
    """promptsource's `choice`, which depends on template and row instead of chance."""

    def __init__(self, task: str, row: Mapping[str, Any]) -> None:
        self._task, self._row, self._key = task, row, 0

    def __call__(self, options: Sequence[Any]) -> Any:
        if not self._key:
            self._key = hash64(self._task, str(sorted(self._row.items(), key=lambda pair: pair[0])))
        self._key = hash64(str(self._key))
        return list(options)[self._key % len(options)]


def _hide_bars(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace(_BAR, _HIDDEN_BAR)
    if isinstance(value, Mapping):
        return {key: _hide_bars(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_hide_bars(part) for part in value]
    return value


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)
    environment.filters["choice"] = _stable_choice
    environment.filters["most_frequent"] = _most_frequent
    environment.globals["zip"] = zip
    environment.filters["zip"] = zip
    return environment


def _stable_choice(options: Sequence[Any]) -> Any:
    return list(options)[hash64(*map(str, options)) % len(options)]


def _most_frequent(values: Sequence[Any]) -> list[Any]:
    """The most common values, in order of first appearance."""
    counts = [sum(other == value for other in values) for value in values]
    return list(dict.fromkeys(value for value, count in zip(values, counts, strict=True) if count == max(counts)))


@functools.lru_cache(maxsize=8)
def read_templates(path: Path, dataset: str) -> tuple[PromptTemplate, ...]:
    """The templates of one file, by name. Raises UserError if the file or a template cannot be read."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader subclass: plain data only
        entries = sorted(tree["templates"].values(), key=lambda entry: entry["name"])
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a promptsource file ({str(error).splitlines()[0]})") from None
    environment = _environment()
    templates = []
    for entry in entries:
        try:
            prompt = environment.from_string(entry["jinja"])
            choices = environment.from_string(entry["answer_choices"]) if entry.get("answer_choices") else None
        except (jinja2.TemplateError, KeyError, TypeError) as error:
            raise UserError(f"{path}: template {entry.get('name')!r} cannot be used: {error}") from None
        templates.append(PromptTemplate(task_name(dataset, entry["name"]), prompt, choices))
    return tuple(templates)


def task_name(dataset: str, template: str) -> str:
    """P3's name for a template: race/high and "Is this the right answer?" give race_high_Is_this_the_right_answer_."""
    return re.sub(r"[^\w.]+", "_", f"{dataset}_{template}")


def _dataset_of(source: MixtureSource, path: Path) -> str:
    """The longest directory path from the source's path to `path` that has templates."""
    assert source.templates is not None, "the validator requires it"
    parts = path.relative_to(source.path).parts[:-1] if path != Path(source.path) else ()
    for end in range(len(parts), 0, -1):
        if (Path(source.templates, *parts[:end]) / FILE).is_file():
            return "/".join(parts[:end])
    raise UserError(
        f"{path}: no {FILE} for it in {source.templates}; rows must be in <dataset>[/<subset>]/ like the templates"
    )


def _read(source: MixtureSource, path: Path, policy: BadRecordPolicy) -> Items:
    assert source.templates is not None, "the validator requires it"
    dataset = _dataset_of(source, path)
    templates = read_templates(Path(source.templates, dataset, FILE), dataset)
    for place, record, _ in raw_records(path, all_columns(path), policy):
        for item in attempt(policy, place, partial(_convert, templates, record)):
            yield place, item


# Exceptions of a template for a row that its author did not expect.
_FAILURES = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)


def _convert(templates: Sequence[PromptTemplate], record: Mapping[str, Any]) -> list[Item]:
    items = []
    row = _hide_bars(record)
    for template in templates:
        try:
            rendered = template.render(row)
        except _FAILURES as error:
            raise BadRecord("a template fails on the record", f"template {template.task!r}: {error}") from None
        if rendered is not None:
            items.append(Item(template.task, PAIR, {"inputs": rendered[0], "targets": rendered[1]}))
    if not items:
        raise Unusable("no template gives the record a target", "")
    return items


READER = Reader(find_training, _read)
