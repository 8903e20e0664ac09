"""Creates the tables of docs/results/scaling.md: plans 13B and 65B, adapters and full fine-tuning, for absent machines.

    pip install 'flacuna-jax[compilers]'
    python benchmarks/scaling.py [cuda|tpu|all]

Each row is the result of `flacuna plan` with the arguments in the row. Rows without an installed compiler are skipped,
with the reason on stderr.
"""

import json
import subprocess
import sys

CONFIG = "configs/flacuna_13b.yaml"
FULL = "--lora=null --training.remat=full"
# A step of 2048 examples keeps 128 or more devices busy with packed rows.
MANY = "--training.batch_size=2048"
ROWS = {
    "cuda": [
        "--target 4xA6000 --sizes 13b",
        "--target 4xA6000 --sizes 13b --mesh={data:4}",
        f"--target 4xA6000 --sizes 13b {FULL} --training.micro_batch_size=1",
        "--target 4xA6000 --sizes 65b --training.micro_batch_size=1 --training.remat=full",
        "--target 8xH100 --sizes 13b --mesh={fsdp:8}",
        f"--target 8xH100 --sizes 13b --mesh={{fsdp:8}} {FULL} --training.micro_batch_size=1",
        "--target 8xH100 --sizes 65b --mesh={fsdp:8}",
        f"--target 8xH100 --sizes 65b --mesh={{fsdp:8}} {FULL} --training.micro_batch_size=1",
        f"--target 16x8xH100 --sizes 13b --mesh={{replica:16,fsdp:8}} {MANY}",
        f"--target 16x8xH100 --sizes 13b --mesh={{replica:16,fsdp:8}} {FULL} {MANY}",
        f"--target 16x8xH100 --sizes 65b --mesh={{replica:16,fsdp:8}} {MANY}",
        f"--target 16x8xH100 --sizes 65b --mesh={{fsdp:128}} {FULL} {MANY}",
    ],
    "tpu": [
        f"--target v5e:16x16 --sizes 13b --mesh={{data:16,fsdp:16}} --training.micro_batch_size=1 {MANY}",
        "--target 2xv5e:16x16 --sizes 13b --mesh={replica:2,data:16,fsdp:16} --training.micro_batch_size=1 "
        "--training.batch_size=4096",
        f"--target v5e:16x16 --sizes 13b --mesh={{fsdp:256}} --training.micro_batch_size=1 {FULL} {MANY}",
        "--target v5e:16x16 --sizes 65b --mesh={data:4,fsdp:64} --training.micro_batch_size=1 --training.remat=full "
        + MANY,
        f"--target v5e:16x16 --sizes 65b --mesh={{fsdp:256}} --training.micro_batch_size=1 {FULL} {MANY}",
        "--target v5p:8x8x8 --sizes 13b --mesh={data:32,fsdp:16} --training.batch_size=4096",
        f"--target v5p:8x8x8 --sizes 13b --mesh={{data:16,fsdp:32}} {FULL} --training.batch_size=4096",
        "--target v5p:8x8x8 --sizes 65b --mesh={data:32,fsdp:16} --training.batch_size=4096",
        f"--target v5p:8x8x8 --sizes 65b --mesh={{data:4,fsdp:128}} {FULL} --training.batch_size=4096",
    ],
}
HEADER = (
    "| arguments of `flacuna plan` | arguments GB | temporaries GB | peak GB of usable | s/step | bound by "
    "| received per step: exchanges, GB | compile s |\n|---|---|---|---|---|---|---|---|"
)


def row(options: str) -> str | None:
    command = [sys.executable, "-m", "flacuna_jax.plan", "--config", CONFIG, "--json", *map(_spaced, options.split())]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{options}: {done.stderr.splitlines()[-1]}", file=sys.stderr)
        return None
    plan = json.loads(done.stdout)
    if plan["source"] != "compiled":
        print(f"{options}: {done.stderr.splitlines()[0]}", file=sys.stderr)
        return None
    memory, gb = plan["memory"], 1e9
    exchanges = ", ".join(
        f"{e['count']:,.0f} {e['kind']} {e['bytes'] / gb:.3g} ({e['link']})" for e in plan["collectives"]
    )
    verdict = "" if plan["fits"] else " **no**"
    return (
        f"| `{options}` | {memory['arguments'] / gb:.1f} | {memory['temporaries'] / gb:.1f} "
        f"| {memory['peak'] / gb:.1f} of {memory['usable'] / gb:.1f}{verdict} | {plan['seconds']['step']:.2f} "
        f"| {plan['bound_by']} | {exchanges} | {plan['compile_seconds']:.0f} |"
    )


def _spaced(option: str) -> str:
    """Adds the space after a colon that YAML needs."""
    return option.replace(":", ": ").replace(",", ", ") if "{" in option else option


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else "all"
    print(HEADER)
    for platform, rows in ROWS.items():
        for options in rows if wanted in (platform, "all") else []:
            line = row(options)
            if line:
                print(line, flush=True)


if __name__ == "__main__":
    main()
