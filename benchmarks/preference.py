"""DPO (LoRA r8 on q and v) against TRL with PEFT on one model and the same pairs: supervised tokens per second.

    python benchmarks/preference.py --model .models/smollm2-135m-instruct [--pairs 64] [--json FILE]

Ours packs pairs into rows; TRL pads a batch of pairs to its longest, with and without gradient checkpointing. Both run
in the compute dtype that `--dtype` names, the reference is the base with adapters switched off, and both count the
tokens of the answers of the same pairs. Each side has a process of its own; its peak memory is beside its rate.
"""

import argparse
import itertools
import json
import random
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import child, environment, median, write_json

WORDS = ("the", "a", "river", "house", "green", "seven", "walks", "over", "under", "bright", "small", "name", "winter")
RANK, ALPHA, TARGETS = 8, 16, ("q_proj", "v_proj")


def pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Pairs with lengths like those of UltraFeedback, shortened: most answers are short, and some ten times as long."""
    rng = random.Random(seed)

    def text(mean: float) -> str:
        return " ".join(rng.choices(WORDS, k=max(3, int(rng.lognormvariate(0, 0.7) * mean))))

    return [{"prompt": text(24), "chosen": text(48), "rejected": text(48)} for _ in range(count)]


def ours(arguments: argparse.Namespace) -> dict[str, Any]:
    from flacuna_jax import StepHook, open_run, parse_config

    with tempfile.TemporaryDirectory() as directory:
        data = Path(directory) / "pairs.jsonl"
        data.write_text("\n".join(map(json.dumps, pairs(arguments.pairs))))
        config = parse_config(
            {
                "output_dir": f"{directory}/run",
                "model": {"path": arguments.model, "dtype": arguments.dtype},
                "lora": {"rank": RANK, "alpha": float(ALPHA), "dropout": 0.0, "targets": list(TARGETS)},
                "data": {"sources": [{"path": str(data)}], "max_length": arguments.length},
                "training": {
                    "objective": {"name": "dpo"},
                    "epochs": 1 + arguments.rounds,
                    "batch_size": arguments.batch,
                    "micro_batch_size": arguments.micro_batch,
                    "remat": arguments.remat,
                },
                "mesh": {"data": 1},
                "logging": {"tensorboard": False},
            }
        )
        ends: list[float] = []
        with open_run(config, say=lambda _: None) as run:
            run.add_hook(StepHook(every=1, call=lambda record, state: ends.append(time.perf_counter())))
            run.train()
            plan, store = run.setup.plan, run.setup.store
            last_of_epochs = [epoch.first_step + epoch.steps - 1 for epoch in plan.epochs]
            seconds = [ends[b] - ends[a] for a, b in itertools.pairwise(last_of_epochs)]
            supervised = int(store.supervised.sum())
            return {"supervised_per_second": supervised / median(seconds), "fill": plan.fill, **_memory()}


def peer(arguments: argparse.Namespace) -> dict[str, Any]:
    import datasets
    import peft
    import torch
    import transformers
    import trl

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    found = {}
    for checkpointing in (False, True):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            arguments.model, dtype=getattr(torch, arguments.dtype), attn_implementation="sdpa"
        )
        records = [
            {name: [{"role": role, "content": record[name]}] for name, role in _ROLES.items()}
            for record in pairs(arguments.pairs)
        ]
        with tempfile.TemporaryDirectory() as directory:
            settings = trl.DPOConfig(
                output_dir=directory,
                report_to="none",
                use_cpu=device == "cpu",
                bf16=arguments.dtype == "bfloat16",
                gradient_checkpointing=checkpointing,
                per_device_train_batch_size=arguments.peer_batch,
                gradient_accumulation_steps=max(1, arguments.batch // arguments.peer_batch),
                num_train_epochs=1 + arguments.rounds,
                max_length=arguments.length,
                save_strategy="no",
                logging_strategy="no",
            )
            lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM")
            trainer = trl.DPOTrainer(
                model,
                args=settings,
                train_dataset=datasets.Dataset.from_list(records),
                processing_class=tokenizer,
                peft_config=lora,
            )
            ends: list[float] = []

            class Clock(transformers.TrainerCallback):
                def on_epoch_end(self, *_: Any, ends: list[float] = ends, **__: Any) -> None:
                    ends.append(time.perf_counter())

            trainer.add_callback(Clock())
            trainer.train()
        supervised = sum(len(one["chosen_ids"]) + len(one["rejected_ids"]) for one in trainer.train_dataset)
        seconds = [b - a for a, b in itertools.pairwise(ends)]
        name = "checkpointing" if checkpointing else "plain"
        found[name] = {"supervised_per_second": supervised / median(seconds), **_memory()}
    return found


_ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}


def _memory() -> dict[str, float]:
    """Peak of this process so far; on a GPU, the device's own statistics are to be preferred."""
    return {"process_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--side", choices=("ours", "peer"), help="measure only one side, in this process")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="epochs that are timed, after one that is not")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a packed row, and of TRL's sequences")
    parser.add_argument("--batch", type=int, default=16, help="pairs per optimizer step")
    parser.add_argument("--micro-batch", type=int, default=1, help="packed rows in one pass of ours")
    parser.add_argument("--peer-batch", type=int, default=4, help="pairs in one pass of TRL")
    parser.add_argument("--remat", default="dots")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results to a file")
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps({"ours": ours, "peer": peer}[arguments.side](arguments)), flush=True)
        return
    passed = [
        text
        for name in ("model", "pairs", "rounds", "length", "batch", "micro_batch", "peer_batch", "remat", "dtype")
        for text in (f"--{name.replace('_', '-')}", str(getattr(arguments, name)))
    ]
    settings = {name: value for name, value in vars(arguments).items() if name not in ("json", "side")}
    result: dict[str, Any] = {"environment": environment(), "settings": settings}
    for side in ("ours", "peer"):
        result[side] = child("preference.py", "--side", side, *passed)
    rates = [mode["supervised_per_second"] for mode in result["peer"].values() if isinstance(mode, dict)]
    if best := max(rates, default=0):
        result["times_faster"] = result["ours"].get("supervised_per_second", 0) / best
    print(json.dumps(result, indent=1))
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
