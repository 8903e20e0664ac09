"""`python -m flacuna_jax.paper.split COLLECTION --held-out N --output DIR`: sets the first records aside.

The order of a collection depends on a hash of its records, so the first ones are a sample. Writes DIR/train.jsonl and
DIR/held_out.jsonl. Records of a held-out item, or with the first question of one, are not in train.jsonl.

With `--held-out-of FILE`, the held-out records are those of another collection with the same items, and
DIR/held_out.jsonl is a copy of FILE.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flacuna_jax.arguments import Parser, whole
from flacuna_jax.cli import run_verb
from flacuna_jax.errors import UserError
from flacuna_jax.whole_files import write_atomically


def main(argv: Sequence[str] | None = None) -> int | None:
    parser = Parser("paper.split", __doc__)
    parser.add_argument("collection", metavar="COLLECTION", help="flan_mini.json of `flacuna prepare`")
    held_out_records = parser.add_mutually_exclusive_group(required=True)
    held_out_records.add_argument("--held-out", type=whole(1), metavar="N")
    held_out_records.add_argument("--held-out-of", metavar="FILE", help="held_out.jsonl of an earlier split")
    parser.add_argument("--output", required=True, metavar="DIR")
    arguments = parser.parse_args(argv)
    records = json.loads(Path(arguments.collection).read_text("utf-8"))
    if arguments.held_out_of is not None:
        held_out = [json.loads(line) for line in Path(arguments.held_out_of).read_text("utf-8").split("\n") if line]
    elif len(records) <= arguments.held_out:
        raise UserError(f"{arguments.collection} has {len(records)} records; {arguments.held_out} cannot be held out")
    else:
        held_out = records[: arguments.held_out]
    marks = {mark for record in held_out for mark in _marks(record)}
    train = [record for record in records if marks.isdisjoint(_marks(record))]
    for name, kept in (("train", train), ("held_out", held_out)):
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        write_atomically(Path(arguments.output) / f"{name}.jsonl", text)
    print(f"{len(train):,} records to train on, {len(held_out):,} held out")
    return None


def _marks(record: Mapping[str, Any]) -> tuple[str, str]:
    """What two records of one item have in common: its id, or the first question."""
    return f"id {record['id']}", f"question {record['conversations'][0]['value']}"


if __name__ == "__main__":
    raise SystemExit(run_verb(main))
