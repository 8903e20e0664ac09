"""`python -m flacuna_jax.paper.split COLLECTION --held-out N --output DIR`: sets the first records aside.

The order of a collection depends on a hash of its records, so the first ones are a sample. Writes DIR/train.jsonl and
DIR/held_out.jsonl. Records whose first question is held out are not in train.jsonl.
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
    parser.add_argument("--held-out", type=whole(1), required=True, metavar="N")
    parser.add_argument("--output", required=True, metavar="DIR")
    arguments = parser.parse_args(argv)
    records = json.loads(Path(arguments.collection).read_text("utf-8"))
    if len(records) <= arguments.held_out:
        raise UserError(f"{arguments.collection} has {len(records)} records; {arguments.held_out} cannot be held out")
    held_out = records[: arguments.held_out]
    questions = {_question(record) for record in held_out}
    train = [record for record in records if _question(record) not in questions]
    for name, kept in (("train", train), ("held_out", held_out)):
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        write_atomically(Path(arguments.output) / f"{name}.jsonl", lines)
    print(f"{len(train):,} records to train on, {len(held_out):,} held out")
    return None


def _question(record: Mapping[str, Any]) -> str:
    return str(record["conversations"][0]["value"])


if __name__ == "__main__":
    raise SystemExit(run_verb(main))
