"""How long a user waits for the first sign of life: `--help`, the first answer, the first evaluation, an export.

    python benchmarks/first_look.py --model .models/smollm2-135m-instruct
    python benchmarks/first_look.py --model M --new-tokens 4 --verbs check,train     # tiny: a few verbs, short answers

Runs the commands themselves, each as a new process. `cold` begins with an empty cache of compiled programs, `warm`
follows it with the same command. Prints for each the seconds, the processor seconds (which depend less on what else
the machine does), and the number of programs that XLA compiled or read from the cache. `--json FILE` writes them.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml
from measure import environment, print_table, write_json

from flacuna_jax.cli import VERBS

QUESTION = "What is gravity?"
RECORDS = 64


@dataclass(frozen=True)
class Look:
    """One command: its wall and processor seconds, and the number of programs."""

    what: str
    seconds: float
    cpu_seconds: float | None = None
    programs: int | None = None


def look(what: str, words: Sequence[str], cache: Path, text: str = "") -> tuple[Look, str]:
    """Runs a command of flacuna with `text` as its input. Returns what it took, and its whole output."""
    settings = {"FLACUNA_CACHE": str(cache), "JAX_LOG_COMPILES": "1"}
    command = [sys.executable, "-m", "flacuna_jax.cli", *words]
    with tempfile.TemporaryFile("w+") as told, tempfile.TemporaryFile("w+") as given:
        given.write(text)
        given.seek(0)
        started = time.perf_counter()
        process = subprocess.Popen(
            command, stdin=given, stdout=told, stderr=subprocess.STDOUT, env={**os.environ, **settings}
        )
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        told.seek(0)
        output = told.read()
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {process.returncode}:\n{output[-2000:]}")
    programs = output.count("Finished XLA compilation of")
    return Look(what, seconds, used.ru_utime + used.ru_stime, programs), output


def training_config(model: str, scratch: Path) -> Path:
    """A run of two steps with a held-out set and sample answers."""
    words = ("red", "blue", "seven", "cat", "dog", "house", "tree", "river")
    records = [
        {"instruction": f"Say {words[i % 8]} {i} times.", "input": "", "output": " ".join([words[i % 8]] * (i % 5 + 1))}
        for i in range(RECORDS)
    ]
    (scratch / "records.json").write_text(json.dumps(records))
    config = {
        "output_dir": str(scratch / "run"),
        "model": {"path": model},
        "data": {"sources": [{"path": str(scratch / "records.json")}], "max_length": 256},
        "training": {"batch_size": 4, "batch_unit": "rows", "micro_batch_size": 2, "max_steps": 2},
        "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
        "evaluation": {"fraction": 0.2, "samples": 2, "sample_tokens": 16},
    }
    path = scratch / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def looks(model: str, verbs: Sequence[str], new_tokens: int, scratch: Path) -> Iterator[Look]:
    for verb in verbs:
        yield look(f"{verb} --help", [verb, "--help"], scratch / "cache")[0]
    limit = f"--max-new-tokens={new_tokens}"
    for state in ("cold", "warm"):
        words = ["generate", "--model", model, limit, QUESTION]
        yield look(f"generate, {state}", words, scratch / "cache")[0]
    yield look("chat, first answer", ["chat", "--model", model, limit], scratch / "cache", f"{QUESTION}\n")[0]
    for state in ("cold", "warm"):
        config = training_config(model, scratch)
        output_dir = scratch / f"run-{state}"
        words = ["train", "--config", str(config), f"--output_dir={output_dir}"]
        run, output = look(f"train, two steps, {state}", words, scratch / "cache-of-training")
        yield run
        evaluations = [float(found) for found in re.findall(r"evaluation after step \d+: .* \(([\d.]+) s\)", output)]
        yield Look(f"first evaluation and samples, {state}", evaluations[0])
        yield Look(f"later evaluation and samples, {state}", evaluations[-1])
    words = ["export", str(output_dir), str(scratch / "merged"), "--format", "merged"]
    yield look("export, merged", words, scratch / "cache")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="DIR", help="a Hugging Face checkpoint with a tokenizer")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--verbs", default=",".join(VERBS), help="whose --help is measured")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = list(looks(arguments.model, arguments.verbs.split(","), arguments.new_tokens, Path(scratch)))
    print_table(
        ("command", "seconds", "processor seconds", "programs"),
        [(one.what, one.seconds, one.cpu_seconds, one.programs) for one in found],
    )
    if arguments.json:
        write_json(arguments.json, {"environment": environment(), "looks": [asdict(one) for one in found]})


if __name__ == "__main__":
    main()
