"""The manifest of a collection: its inputs and its content, as hashes and counts. It has no times, and paths of the
machine only in the places of first occurrences, so that equal builds have equal manifests."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flacuna_jax.errors import UserError
from flacuna_jax.flan_mini.account import SourceAccount, Statistics
from flacuna_jax.flan_mini.collection import Built, Inputs
from flacuna_jax.flan_mini.config import FlanMiniConfig
from flacuna_jax.flan_mini.identity import differences, file_hash
from flacuna_jax.flan_mini.work import Result, load_result, save_result, writing
from flacuna_jax.version import __version__

MANIFEST, STATISTICS = "manifest.json", "statistics.npz"


def write_manifest(config: FlanMiniConfig, inputs: Inputs, built: Built) -> None:
    """Writes manifest.json, and the statistics of the records for reports."""
    tree = {
        "made_by": f"flacuna_jax {__version__}",
        "key": inputs.key,
        "seed": config.seed,
        "output": {
            "file": built.path.name,
            "sha256": built.sha256,
            "bytes": built.path.stat().st_size,
            "records": built.records,
        },
        "made_of": inputs.parts,
        "sources": [account.to_json() for account in built.accounts],
    }
    statistics = built.statistics
    arrays = {name: getattr(statistics, name) for name in _COLUMNS}
    facts = {"sources": statistics.sources, "tasks": statistics.tasks}
    save_result(config.directory / STATISTICS, Result(arrays, facts))
    with writing(config.directory / MANIFEST) as file:
        json.dump(tree, file, indent=1, ensure_ascii=False)
        file.write("\n")


_COLUMNS = ("source", "task", "length", "supervised", "traits", "text")


@dataclass(frozen=True)
class Found:
    """An existing build: usable (`built`) or not, and why."""

    built: Built | None
    why: str


def find_built(config: FlanMiniConfig, inputs: Inputs) -> Found:
    """Looks for a finished build of the same inputs and settings in the output directory, and checks its bytes."""
    path = config.directory / MANIFEST
    if not path.is_file():
        return Found(None, "nothing has been built yet")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        output = tree["output"]
        if tree["key"] != inputs.key:
            return Found(None, f"changed since: {_listed(differences(tree['made_of'], _as_json(inputs.parts)))}")
        file = config.directory / output["file"]
        if not file.is_file() or file.stat().st_size != output["bytes"] or file_hash(file) != output["sha256"]:
            return Found(None, f"{output['file']} is missing or was changed")
        saved = load_result(config.directory / STATISTICS)
        statistics = Statistics(tuple(saved.facts["sources"]), tuple(saved.facts["tasks"]), **saved.arrays)
        accounts = tuple(
            SourceAccount(**{**account, "ignored_files": tuple(account["ignored_files"])})
            for account in tree["sources"]
        )
        built = Built(output["records"], output["sha256"], file, accounts, statistics)
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        return Found(None, f"its manifest or statistics cannot be read ({type(error).__name__})")
    return Found(built, "same inputs, settings and code")


def _as_json(tree: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(tree))


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
