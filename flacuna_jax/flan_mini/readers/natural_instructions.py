"""Raw Natural Instructions v2 task files: one JSON object per task, in the early layout and in the final one.

Early: `Definition` is text, an instance is {input, output: [...]}. Final: `Definition` is a list of texts, instances
have an id. The task's name is that of the file. Of several right outputs one is used; the choice depends on the
content.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flacuna_jax.data.formats import BadRecord
from flacuna_jax.data.report import BadRecordPolicy
from flacuna_jax.flan_mini.config import MixtureSource
from flacuna_jax.flan_mini.items import Item, hash64
from flacuna_jax.flan_mini.readers.common import (
    Items,
    Reader,
    Unusable,
    attempt,
    filled,
    find_all,
    raw_records,
    text_of,
)

FAMILY = "task_definition"


def _read(source: MixtureSource, path: Path, policy: BadRecordPolicy) -> Items:
    task = path.name.split(".")[0]
    for place, record, _ in raw_records(path, (), policy):
        # A record is an instance here; the task itself counts as another record only if it is invalid.
        try:
            definition, exemplars, instances = _task(record)
        except BadRecord as bad:
            policy.reject(bad.reason, place, bad.detail)
            continue
        policy.report.read += len(instances) - 1
        for number, instance in enumerate(instances, start=1):
            where = f"{path}, instance {number}"
            make = partial(_item, task, definition, exemplars, instance)
            for item in attempt(policy, where, lambda: [make()]):  # noqa: B023, called at once
                yield place, item


def _task(record: Mapping[str, Any]) -> tuple[str, list[list[str]], list[Any]]:
    given = record.get("Definition")
    parts = given if isinstance(given, list) else [given]
    definition = "\n".join(part for part in parts if isinstance(part, str)).strip()
    if not definition:
        raise BadRecord("no definition", "'Definition' must be text or a list of texts, and must not be empty")
    instances = record.get("Instances")
    if not isinstance(instances, list) or not instances:
        raise BadRecord("no instances", "'Instances' must be a list with at least one instance")
    return definition, list(_exemplars(record.get("Positive Examples"))), instances


def _exemplars(examples: object) -> Iterator[list[str]]:
    """[input, output, explanation] of the positive examples that have the first two; explanations may be empty."""
    for example in examples if isinstance(examples, list) else []:
        if isinstance(example, dict):
            output = example.get("output")
            output = output[0] if isinstance(output, list) and output else output
            given = (example.get("input"), output, example.get("explanation") or "")
            values = [value.strip() for value in given if isinstance(value, str)]
            if len(values) == 3 and values[0] and values[1]:
                yield values


def _item(task: str, definition: str, exemplars: list[list[str]], instance: object) -> Item:
    if not isinstance(instance, dict):
        raise BadRecord("wrong type", f"an instance must be an object, not {type(instance).__name__}")
    text = filled(text_of(instance, "input"), "input")
    outputs = instance.get("output")
    if isinstance(outputs, str):
        outputs = [outputs]
    if not isinstance(outputs, Sequence) or not all(isinstance(output, str) for output in outputs):
        raise BadRecord("wrong type", "'output' must be text or a list of texts")
    answers = [output.strip() for output in outputs if output.strip()]
    if not answers:
        raise Unusable("empty text", "the output is empty")
    answer = answers[hash64(task, text) % len(answers)]
    fields = {"definition": definition, "input": text, "answer": answer, "exemplars": exemplars}
    return Item(task, FAMILY, fields)


READER = Reader(find_all, _read)
