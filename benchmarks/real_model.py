"""Compares training and decoding of a real model with transformers + PEFT, in one run, on the device of this machine.

    python benchmarks/real_model.py --model .models/smollm2-135m-instruct --records code_alpaca_2k.json

LoRA of rank 8 on q and v, rows of 1280 tokens, the optimizer step of `flacuna train` with its data pipeline. The peer
gets the same documents, in the modes that are fastest for it (train_peer.py): one document per row, padded to the
longest of a micro-batch, and packed rows. Then greedy decoding of one prompt, and of 16 prompts of mixed lengths, which
transformers gets as one batch padded at the left.

Each side is a separate process that stays alive; the sides take turns, so that a change of the machine's speed affects
both, and the table has medians over the rounds. Prints tables; `--json` writes everything.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measure import environment, median, print_table, write_json
from sides import Side

PARTS = ("training", "decoding")
DTYPES = ("bfloat16", "float32")
MODES = ("longest", "packed")
PROMPTS = (
    "What is the capital of France?",
    "Write a short story about a lighthouse keeper.",
    "Explain why the sky is blue to a child of five.",
    "List three uses of a paper clip.",
)
NEW_TOKENS = 128


@contextlib.contextmanager
def sides(peer_python: str | None) -> Iterator[tuple[Side, Side | None]]:
    ours = Side("real_model_ours.py", sys.executable)
    peer = Side("real_model_peer.py", peer_python) if peer_python else None
    try:
        yield ours, peer
    finally:
        for side in filter(None, (ours, peer)):
            side.close()


def compare_training(ours: Side, peer: Side | None, arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Supervised tokens per second: our best dtype, and every mode of the peer."""
    settings = {name: getattr(arguments, name) for name in ("model", "records", "length", "rows")}
    documents = {}
    for dtype in arguments.dtypes:
        documents = ours.ask("open_run", dtype=dtype, directory=str(scratch / dtype), **settings)
    modes = [(dtype, mode) for dtype in arguments.dtypes for mode in MODES] if peer else []
    for dtype, mode in modes:
        assert peer is not None
        peer.ask("open", model=arguments.model, dtype=dtype, mode=mode, length=arguments.length, documents=documents)
    rates: dict[str, list[float]] = {}
    for number in range(arguments.rounds + 1):
        for dtype in arguments.dtypes:
            rates.setdefault(f"flacuna_jax {dtype}", []).append(ours.ask("step", dtype=dtype))
        for dtype, mode in modes:
            assert peer is not None
            rates.setdefault(f"PEFT {dtype} {mode}", []).append(peer.ask("step", dtype=dtype, mode=mode))
        if number == 0:  # compiles, and warms caches
            rates = {}
    return {"supervised_per_second": {name: median(values) for name, values in rates.items()}, "all": rates}


def compare_decoding(ours: Side, peer: Side | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds to the first token, and new tokens per second, of one prompt and of a batch of 16."""
    one = [PROMPTS[1]]  # its answer is as long as allowed
    many = [" ".join([PROMPTS[i % 4]] * (1 + i % 7)) for i in range(16)]
    found: dict[str, dict[str, list[float]]] = {}
    answers: dict[str, list[str]] = {}
    for number in range(arguments.rounds + 1):
        for dtype in arguments.dtypes:
            for name, side in (("flacuna_jax", ours), ("transformers", peer)):
                if side is None:
                    continue
                place = found.setdefault(f"{name} {dtype}", {})
                for what, prompts, new in (("first", one, 1), ("one", one, NEW_TOKENS), ("batch", many, NEW_TOKENS)):
                    done = side.ask("generate", model=arguments.model, dtype=dtype, prompts=prompts, new_tokens=new)
                    value = done["seconds"] if what == "first" else done["tokens"] / done["seconds"]
                    place.setdefault(what, []).append(value)
                    answers[f"{name} {dtype} {what}"] = done["texts"]
        if number == 0:
            found = {}
    same = {
        dtype: sum(a == b for a, b in zip(*pair, strict=True))
        for dtype in arguments.dtypes
        if all(pair := [answers.get(f"{name} {dtype} batch") for name in ("flacuna_jax", "transformers")])
    }
    medians = {name: {what: median(values) for what, values in of.items()} for name, of in found.items()}
    return {"medians": medians, "all": found, "equal_texts_of_16": same}


def show_training(training: dict[str, Any]) -> None:
    rates = training["supervised_per_second"]
    best = max((rate for name, rate in rates.items() if name.startswith("PEFT")), default=None)
    print_table(
        ("training", "supervised tokens/s", "of PEFT's best"),
        [[name, rate, f"{rate / best:.2f}×" if best else None] for name, rate in rates.items()],
    )
    print()


def show_decoding(decoding: dict[str, Any]) -> None:
    peers = [of for name, of in decoding["medians"].items() if name.startswith("transformers")]
    rows = []
    for name, of in decoding["medians"].items():
        ratios = [
            f"{of[what] / max(peer[what] for peer in peers):.2f}×" if peers else None for what in ("one", "batch")
        ]
        rows.append([name, of["first"], of["one"], ratios[0], of["batch"], ratios[1]])
    header = ("decoding", "first token s", "1 prompt tokens/s", "of best", "16 prompts tokens/s", "of best")
    print_table(header, rows)
    print(f"equal texts of 16: {decoding['equal_texts_of_16']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of the checkpoint in Hugging Face form")
    parser.add_argument("--records", required=True, help="training records, such as those of Code Alpaca")
    parser.add_argument("--length", type=int, default=1280)
    parser.add_argument("--rows", type=int, default=2, help="packed rows per optimizer step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="both; bfloat16 takes long on some processors"
    )
    parser.add_argument("--peer-python", default=sys.executable, help="with torch, transformers and peft; '' for none")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="both")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    for name in ("model", "records"):
        setattr(arguments, name, os.path.abspath(getattr(arguments, name)))
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, sides(arguments.peer_python) as (ours, peer):
        found = {}
        if "training" in arguments.parts:
            found["training"] = compare_training(ours, peer, arguments, Path(scratch))
            show_training(found["training"])
        if "decoding" in arguments.parts:
            found["decoding"] = compare_decoding(ours, peer, arguments)
            show_decoding(found["decoding"])
    if arguments.json:
        seconds = time.monotonic() - started
        write_json(arguments.json, {"environment": environment(), "seconds": seconds, "real_model": found})


if __name__ == "__main__":
    main()
