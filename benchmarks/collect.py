"""Joins the parts of `scripts/gpu_check.sh` into one file, named after the device and the day.

python benchmarks/collect.py PARTS RESULTS
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from measure import write_json


def joined(parts: Path) -> dict[str, Any]:
    """{"environment": ..., and a section for each part}."""
    document: dict[str, Any] = {"environment": json.loads((parts / "environment.json").read_text(encoding="utf-8"))}
    for path in sorted(parts.glob("*.json")):
        if path.name != "environment.json":
            document |= {k: v for k, v in json.loads(path.read_text(encoding="utf-8")).items() if k != "environment"}
    return document


def file_name(environment: dict[str, Any]) -> str:
    """`nvidia-h200-2026-01-01.json`"""
    device = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    return f"{device}-{environment['date']}.json"


def main() -> None:
    parts, results = map(Path, sys.argv[1:3])
    document = joined(parts)
    path = results / file_name(document["environment"])
    write_json(path, document)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
