"""Compares the whole training step with transformers + PEFT on the device of this machine.

    python benchmarks/train_step.py                          # the preset for this device
    python benchmarks/train_step.py --preset gpu --seconds 420 --json result.json --profile profile/

Random weights in LLaMA's shapes, LoRA of rank 8 with dropout 0.05 on q,v or on all seven projections, rows of 1280
tokens, AdamW with clipping. Both sides get the same documents: ours packed, the peer's packed and padded, with and
without gradient checkpointing. Each side has a separate process, and so exclusive use of the device. Needs jax, flax
and optax; torch, transformers and peft for the peer.

tokens/s counts tokens of documents, never padding; supervised/s those that carry loss. "of ceiling" is 4 FLOP per token
and matrix weight (forward and the gradient of activations; the head counted for every token, attention not at all)
against square products measured in the same process. Prints a table; `--json` writes everything.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import child, environment, print_table, write_json

PADDED_MODES = ("padded", "padded+checkpointing", "longest", "longest+checkpointing")
PACKED_MODES = ("packed", "packed+checkpointing")


@dataclass(frozen=True)
class Peer:
    dtype: str
    modes: tuple[str, ...] = PADDED_MODES + PACKED_MODES
    budget: float = 5.0


@dataclass(frozen=True)
class Case:
    """One network and its variants, written REMAT:MICRO_BATCH."""

    shape: str
    targets: str
    corpus: str
    dtype: str
    rows: int
    batches: int
    variants: tuple[str, ...]
    peers: tuple[Peer, ...] = ()
    length: int = 1280
    budget: float = 8.0
    peer_micro_batch: int = 2

    @property
    def name(self) -> str:
        return f"{self.shape} {self.targets}"

    @property
    def common(self) -> list[str]:
        pairs = ("shape", "targets", "corpus", "length", "rows", "batches")
        return [text for key in pairs for text in (f"--{key}", str(getattr(self, key)))]


_GPU = {"corpus": "flan", "dtype": "bfloat16", "rows": 8, "batches": 2}
_BF16 = (Peer("bfloat16"),)
PRESETS = {
    "tiny": [
        Case("tiny", "q,v", "tiny", "float32", 4, 2, ("dots:2",), (Peer("float32", budget=0.1),), 128, 0.2),
        Case("tiny", "all", "tiny", "float32", 4, 2, ("full:2",), (), 128, 0.2),
    ],
    # The peer also in bfloat16, which torch multiplies twice as fast as float32 on processors with AVX512-BF16.
    "cpu": [
        Case(
            "58m",
            "q,v",
            "code-alpaca",
            "float32",
            3,
            2,
            ("dots:1",),
            (Peer("float32"), Peer("bfloat16", ("longest", "packed"))),
        )
    ],
    "gpu": [
        Case("13b", "q,v", variants=("dots:8", "none:4"), peers=_BF16, **_GPU),
        Case("7b", "q,v", variants=("dots:8", "none:8"), peers=_BF16, **_GPU),
        Case("13b", "all", variants=("dots:8",), peers=(Peer("bfloat16", ("longest", "packed")),), **_GPU),
        Case("7b", "all", variants=("dots:8",), peers=(Peer("bfloat16", ("longest", "packed")),), **_GPU),
    ],
}


def measure(case: Case, deadline: float, profile: str | None, only_ours: bool) -> dict[str, Any]:
    ours_arguments = [*case.common, "--dtype", case.dtype, "--budget", str(case.budget), "--variants", *case.variants]
    if profile:
        ours_arguments += ["--profile", f"{profile}/{case.shape}-{case.targets.replace(',', '')}"]
    result: dict[str, Any] = {
        "case": case.name,
        "ours": child("train_ours.py", *ours_arguments, timeout=_left(deadline)),
    }
    result["peers"] = {}
    for peer in () if only_ours else case.peers:
        more = ["--dtype", peer.dtype, "--budget", str(peer.budget), "--micro-batch", str(case.peer_micro_batch)]
        found = child("train_peer.py", *case.common, *more, "--modes", *peer.modes, timeout=_left(deadline))
        result["peers"][peer.dtype] = found
    return result


def _left(deadline: float) -> float:
    return max(1.0, deadline - time.monotonic())


def rows_of(result: dict[str, Any]) -> list[list[Any]]:
    """Rows of the table, one per measurement, with the speed relative to the peer's best with the same dtype and any
    dtype."""
    if "failed" in result["ours"]:
        return [[result["case"], "flacuna_jax", result["ours"]["failed"], *[None] * 5]]
    ceiling = result["ours"]["ceiling_flops_per_second"]
    best = best_peer(result)
    rows = []
    for found in result["ours"]["variants"]:
        name = f"flacuna_jax, remat {found['remat']}, {found['micro_batch']} rows"
        if "failed" in found:
            rows.append([result["case"], name, found["failed"], *[None] * 5])
            continue
        ratio = f"{found['supervised_per_second'] / best:.2f}×" if best else None
        share = f"{100 * found['model_flops_per_second'] / ceiling:.1f} %"
        speeds = [found["tokens_per_second"], found["supervised_per_second"]]
        rows.append([result["case"], name, *speeds, ratio, share, found["memory_gb"], found["compile_seconds"]])
    for dtype, peer in result["peers"].items():
        if "failed" in peer:
            rows.append([result["case"], f"PEFT {dtype}", peer["failed"], *[None] * 5])
            continue
        for mode, found in peer["modes"].items():
            speeds = [found.get("failed") or found["tokens_per_second"], found.get("supervised_per_second")]
            rows.append(
                [result["case"], f"PEFT {dtype} {mode}", *speeds, None, None, found.get("process_peak_gb"), None]
            )
    return rows


def best_peer(result: dict[str, Any]) -> float | None:
    """Supervised tokens per second of the peer's fastest mode."""
    modes = [found for peer in result["peers"].values() for found in peer.get("modes", {}).values()]
    return max((found["supervised_per_second"] for found in modes if "failed" not in found), default=None)


HEADER = ("case", "side", "tokens/s", "supervised/s", "of best peer", "of ceiling", "memory GB", "compile s")


def run(preset: str, seconds: float, profile: str | None = None, only_ours: bool = False) -> dict[str, Any]:
    """Runs all cases of a preset for at most `seconds`; skipped cases are listed."""
    deadline = time.monotonic() + seconds
    results, left_out = [], []
    for case in PRESETS[preset]:
        if time.monotonic() > deadline - 5:
            left_out.append(case.name)
            continue
        results.append(measure(case, deadline, profile, only_ours))
    return {"preset": preset, "cases": results, "left_out": left_out}


def show(found: dict[str, Any]) -> None:
    print_table(HEADER, [row for result in found["cases"] for row in rows_of(result)])
    for result in found["cases"]:
        if "ceiling_flops_per_second" in result["ours"]:
            print(f"{result['case']}: matmul ceiling {result['ours']['ceiling_flops_per_second'] / 1e12:.3g} TFLOP/s")
    if found["left_out"]:
        print(f"out of time, not measured: {', '.join(found['left_out'])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="default: depends on the device")
    parser.add_argument("--seconds", type=float, default=3600.0, help="starts no new measurement after this time")
    parser.add_argument("--profile", help="directory for profiles of our step (TensorBoard, Perfetto)")
    parser.add_argument("--only-ours", action="store_true", help="without the peer")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    started = time.monotonic()
    here = environment()
    preset = arguments.preset or ("cpu" if here["platform"] == "cpu" else "gpu")
    found = run(preset, arguments.seconds, arguments.profile, arguments.only_ours)
    show(found)
    if arguments.json:
        write_json(arguments.json, {"environment": here, "seconds": time.monotonic() - started, "train_step": found})


if __name__ == "__main__":
    main()
