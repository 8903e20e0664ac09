"""Small sources in their published layouts, and a tokenizer that needs no file."""

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from flacuna_jax.flan_mini.config import FlanMiniConfig, MixtureSource
from tests.vocabularies import Characters


def load_characters() -> Characters:
    return Characters()


def config(directory: Path, *sources: MixtureSource | dict[str, Any], **settings: Any) -> FlanMiniConfig:
    settings = {"max_length": 4000, "tokenizer": "unused"} | settings
    made = tuple(source if isinstance(source, MixtureSource) else MixtureSource(**source) for source in sources)
    return FlanMiniConfig(output_dir=str(directory), sources=made, **settings)


def jsonl(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def flan_rows(count: int, task: str = "glue/rte:2.0.0", type_: str | None = "zs_opt") -> list[dict[str, str]]:
    rows = [
        {
            "inputs": f"Is {task} number {i} right?",
            "targets": f"It is {i}.",
            "task_source": "Flan2021",
            "task_name": task,
        }
        for i in range(count)
    ]
    return [row | {"template_type": type_} for row in rows] if type_ else rows


def niv2_task(count: int, final: bool = True, exemplars: int = 3) -> dict[str, Any]:
    """A task file in the final layout, or in the early one."""
    definition = "Say the number that follows."
    instances = [{"input": f"What follows {i}?", "output": [str(i + 1), f"{i + 1}."]} for i in range(count)]
    if final:
        instances = [{"id": f"t-{i}", **instance} for i, instance in enumerate(instances)]
    return {
        "Definition": [definition] if final else definition,
        "Positive Examples": [
            {"input": f"What follows {i}?", "output": str(i + 1), "explanation": f"{i} + 1"}
            for i in range(1000, 1000 + exemplars)
        ],
        "Instances": instances,
    }


def cot_tsv(path: Path, count: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(f"How much is {i}+1?\\nSay it.\t{i + 1}\tOne more than {i} is {i + 1}.\n" for i in range(count))
    )
    return path


def code_search_rows(count: int, language: str = "python", partition: str = "train") -> list[dict[str, str]]:
    return [
        {
            "func_name": f"add_{i}",
            "code": f'def add_{i}(x):\n    """Add {i}."""\n    return x + {i}',
            "docstring": f"Add {i}.",
            "language": language,
            "partition": partition,
        }
        for i in range(count)
    ]


def contest_rows(count: int) -> list[dict[str, Any]]:
    """As on the Hub: solutions is a struct of two lists; 1 Python 2, 2 C++, 3 Python, 4 Java, 0 unknown."""
    return [
        {
            "name": f"{i}_A",
            "description": f"Read n and print n + {i}.",
            "solutions": {
                "language": [3, 2, 3, 0],
                "solution": [
                    f"print(int(input()) + {i})",
                    f"int main() {{ return {i}; }}",
                    f"print({i} + int(input()))",
                    "?",
                ],
            },
        }
        for i in range(count)
    ]


def alpaca_rows(count: int) -> list[dict[str, str]]:
    return [
        {"instruction": f"Double {i}.", "input": "" if i % 2 else f"{i}", "output": f"{2 * i}"} for i in range(count)
    ]


def chat(identity: str, *texts: str, first: str = "human") -> dict[str, Any]:
    names = ("human", "gpt") if first == "human" else ("gpt", "human")
    return {"id": identity, "conversations": [{"from": names[i % 2], "value": text} for i, text in enumerate(texts)]}
