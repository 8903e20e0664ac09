"""DPO (LoRA r8 on q and v) against TRL with PEFT on one model and the same real pairs: supervised tokens per second.

    python benchmarks/preference.py --model .models/smollm2-135m-instruct [--pairs 32] [--json FILE]

The pairs are those of the HHH alignment benchmark in FLACUNA_TEST_DATA, or the records of a JSON file with prompt,
chosen and rejected. Ours packs pairs into rows; TRL pads a batch of pairs to its longest, in several batch sizes, of
which the fastest counts. Both run in the compute dtype that `--dtype` names, with the base as reference, on the same
token ids.

Each side is a process that stays alive; they take turns, one epoch each, so that a change of the machine's speed
affects all. The table has medians over the rounds, and the peak memory of each process.
"""

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import environment, median, print_table, write_json
from sides import Side

HHH = "hhh/derived_bigbench_layout"


def read_pairs(records: Path | None, count: int) -> list[dict[str, str]]:
    """A random choice of the pairs, the same in every run."""
    found = _hhh_pairs() if records is None else json.loads(records.read_text())
    return random.Random(0).sample(found, min(count, len(found)))


def _hhh_pairs() -> list[dict[str, str]]:
    directory = Path(os.environ.get("FLACUNA_TEST_DATA", ""), HHH)
    pairs = []
    for path in sorted(directory.glob("*/task.json")):
        for example in json.loads(path.read_text())["examples"]:
            rejected, chosen = sorted(example["target_scores"], key=example["target_scores"].__getitem__)
            pairs.append({"prompt": example["input"], "chosen": chosen, "rejected": rejected})
    if not pairs:
        raise SystemExit(f"no pairs: FLACUNA_TEST_DATA has no {HHH}/*/task.json; name a file with --records")
    return pairs


def compare(sides: dict[str, Side], rounds: int) -> dict[str, Any]:
    """Of each side: supervised tokens per second, without the first epoch, which compiles, and peak memory."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(rounds + 1):
        for name, side in sides.items():
            found[name].append(side.ask("epoch"))
    return {
        name: {
            "supervised_per_second": median([epoch["supervised"] / epoch["seconds"] for epoch in epochs[1:]]),
            "epochs": epochs,
            "process_peak_gb": epochs[-1]["process_peak_gb"],
        }
        for name, epochs in found.items()
    }


def show(found: dict[str, Any]) -> None:
    best = max((of["supervised_per_second"] for name, of in found.items() if name.startswith("TRL")), default=None)
    rows = []
    for name, of in found.items():
        rate = of["supervised_per_second"]
        loss = of["epochs"][-1]["loss"]
        rows.append([name, rate, f"{rate / best:.2f}×" if best else None, of["process_peak_gb"], loss])
    print_table(("DPO", "supervised tokens/s", "of TRL's best", "peak GB", "loss of the last epoch"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of the checkpoint in Hugging Face form")
    parser.add_argument("--records", type=Path, help="JSON list of pairs; default: those of FLACUNA_TEST_DATA")
    parser.add_argument("--pairs", type=int, default=32, help="pairs of an epoch")
    parser.add_argument("--rounds", type=int, default=3, help="epochs that are timed, after one that is not")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a packed row, and of TRL's sequences")
    parser.add_argument("--batch", type=int, default=16, help="pairs per optimizer step")
    parser.add_argument("--micro-batch", type=int, default=1, help="packed rows in one pass of ours")
    parser.add_argument("--peer-batches", type=int, nargs="*", default=[1, 2, 4], help="pairs in one pass of TRL")
    parser.add_argument("--checkpointing", action="store_true", help="also measure TRL with gradient checkpointing")
    parser.add_argument("--remat", default="dots", help="remat policy of ours")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--peer-python", default=sys.executable, help="with torch, trl and peft")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to a file")
    arguments = parser.parse_args()
    pairs = read_pairs(arguments.records, arguments.pairs)
    common = {"model": os.path.abspath(arguments.model), "pairs": pairs}
    common |= {name: getattr(arguments, name) for name in ("dtype", "length", "batch", "rounds")}
    modes = [(size, False) for size in arguments.peer_batches]
    modes += [(size, True) for size in arguments.peer_batches[-1:] if arguments.checkpointing]
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        sides = {"flacuna_jax": Side("preference_ours.py", sys.executable)}
        sides |= {
            f"TRL, batches of {size}" + checkpointed * ", checkpointing": Side(
                "preference_peer.py", arguments.peer_python
            )
            for size, checkpointed in modes
        }
        for side in sides.values():
            stack.callback(side.close)
        ours, *peers = sides.values()
        common["directory"] = scratch
        documents = ours.ask("open", **common, micro_batch=arguments.micro_batch, remat=arguments.remat)
        for peer, (size, checkpointed) in zip(peers, modes, strict=True):
            theirs = peer.ask("open", **common, micro_batch=size, checkpointing=checkpointed)
            if sorted(theirs) != sorted(documents):
                raise SystemExit("the two sides have different token ids; ours drops pairs longer than --length")
        found = compare(sides, arguments.rounds)
    show(found)
    if arguments.json:
        settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "peer_python")}
        settings |= {"model": Path(arguments.model).name, "records": str(arguments.records or HHH)}
        write_json(arguments.json, {"environment": environment(), "settings": settings, "preference": found})


if __name__ == "__main__":
    main()
