"""Data preparation for training: speed compared with TRL, fill, memory for 1.34 million records, reading.

    python benchmarks/data_pipeline.py compare --records data/mini/flan_mini.json --tokenizer models/vicuna \
        --trl-python /path/to/venv/bin/python        # a Python with trl; without it only our side is measured
    python benchmarks/data_pipeline.py scale --tokenizer models/vicuna --directory /scratch --records 1340000
    python benchmarks/data_pipeline.py read --tokenizer models/vicuna --directory /scratch

`compare` gives both sides the same single-turn records, one process each, and reports tokens per second of CPU time:
ours by `build_store` and `pack`, TRL's by `SFTTrainer._prepare_dataset` (datasets.map with the fast tokenizer,
completion masks, bfd packing). `scale` writes synthetic records of FLAN-like lengths, prepares them in a process that
is killed before the end, and then completely. `read` measures packed batches per second, and restores the iterator on
another number of hosts. Prints one JSON object per line.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MAX_LENGTH = 1280


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def cpu_seconds() -> float:
    return sum(resource.getrusage(who).ru_utime + resource.getrusage(who).ru_stime for who in
               (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))  # fmt: skip


# ---- compare


def single_turn(path: Path) -> list[tuple[str, str]]:
    records = json.loads(path.read_text(encoding="utf-8"))
    conversations = (record["conversations"] for record in records)
    return [(c[0]["value"], c[1]["value"]) for c in conversations if len(c) == 2 and c[1]["value"]]


def compare(arguments: argparse.Namespace) -> None:
    pairs = single_turn(arguments.records)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "pairs.jsonl"
        with file.open("w", encoding="utf-8") as out:
            for prompt, completion in pairs * arguments.repeat:
                out.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
        for child, python in (("ours", sys.executable), ("trl", arguments.trl_python)):
            if python:
                command = [python, __file__, child, "--pairs", str(file), "--tokenizer", str(arguments.tokenizer)]
                environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "JAX_PLATFORMS": "cpu"}
                subprocess.run([*command, "--scratch", directory], check=True, env=environment)


def ours(arguments: argparse.Namespace) -> None:
    import numpy as np

    from flacuna_jax.config.data import DataConfig, SourceConfig
    from flacuna_jax.data.build import build_store
    from flacuna_jax.data.packing import pack
    from flacuna_jax.huggingface.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(arguments.tokenizer)
    tokenizer.encode("warm")
    config = DataConfig(sources=(SourceConfig(path=str(arguments.pairs)),), max_length=MAX_LENGTH)
    cpu, wall = cpu_seconds(), time.perf_counter()
    store, report = build_store(config, tokenizer)
    tokenised = cpu_seconds()
    plan = pack(store.lengths, MAX_LENGTH, "best_fit", 0, 0)
    end_cpu, end_wall = cpu_seconds(), time.perf_counter()
    tokens = int(store.offsets[-1])
    say(
        side="flacuna_jax",
        examples=len(store),
        tokens=tokens,
        supervised=int(np.sum(store.supervised)),
        cpu_seconds=round(end_cpu - cpu, 2),
        wall_seconds=round(end_wall - wall, 2),
        packing_cpu_seconds=round(end_cpu - tokenised, 2),
        tokens_per_cpu_second=round(tokens / (end_cpu - cpu)),
        rows=plan.rows,
        fill=round(tokens / (plan.rows * MAX_LENGTH), 4),
        padding_tokens=plan.rows * MAX_LENGTH - tokens,
        tokens_truncated=0,
        over_length_tokens_dropped=sum(source.tokens_lost for source in report.sources),
        peak_rss_gib=peak_rss_gib(),
    )


def trl(arguments: argparse.Namespace) -> None:
    os.environ["HF_HOME"] = str(arguments.scratch / "hf")
    import datasets
    import trl
    from transformers import AutoTokenizer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(str(arguments.tokenizer))
    tokenizer.bos_token, tokenizer.eos_token = "<s>", "</s>"
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    rows = [json.loads(line) for line in arguments.pairs.open(encoding="utf-8")]
    dataset = datasets.Dataset.from_list(
        [
            {"prompt": f"{system} USER: {row['prompt']} ASSISTANT:", "completion": f" {row['completion']}</s>"}
            for row in rows
        ]
    )
    settings = trl.SFTConfig(
        output_dir=str(arguments.scratch / "trl"),
        max_length=MAX_LENGTH,
        packing=True,
        packing_strategy="bfd",
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    trainer = object.__new__(trl.SFTTrainer)  # only its data preparation is used, which needs no model
    trainer._tokenizer, trainer.chat_template, trainer.completion_only_loss = tokenizer, None, True
    cpu, wall = cpu_seconds(), time.perf_counter()
    prepared = trainer._prepare_dataset(dataset, tokenizer, settings, True, None, "train")
    end_cpu, end_wall = cpu_seconds(), time.perf_counter()
    lengths = [sum(row) for row in prepared["seq_lengths"]]
    whole = sum(len(ids) for ids in tokenizer([r["prompt"] + r["completion"] for r in dataset])["input_ids"])
    tokens = sum(lengths)
    say(
        side=f"trl {trl.__version__}, {type(tokenizer).__name__}",
        examples=len(rows),
        tokens=tokens,
        supervised=sum(label != -100 for labels in prepared["labels"] for label in labels),
        cpu_seconds=round(end_cpu - cpu, 2),
        wall_seconds=round(end_wall - wall, 2),
        tokens_per_cpu_second=round(tokens / (end_cpu - cpu)),
        rows=len(lengths),
        fill=round(tokens / (len(lengths) * MAX_LENGTH), 4),
        padding_tokens=len(lengths) * MAX_LENGTH - tokens,
        tokens_truncated=whole - tokens,
        peak_rss_gib=peak_rss_gib(),
    )


# ---- scale


def flan_like(count: int) -> Iterator[str]:
    """Records with lengths like FLAN-mini's: most have one or two hundred tokens, with a tail of few-shot groups and
    chats."""
    import numpy as np

    rng = np.random.default_rng(0)
    words = (
        "the",
        "of",
        "and",
        "to",
        "a",
        "in",
        "that",
        "was",
        "river",
        "house",
        "number",
        "question",
        "answer",
        "because",
    )
    pool = [words[i] for i in rng.integers(0, len(words), 1 << 20)]
    prompts = np.clip(rng.lognormal(4.6, 0.9, count), 4, 900).astype(int)
    answers = np.clip(rng.lognormal(3.0, 1.3, count), 1, 280).astype(int)
    starts = rng.integers(0, len(pool) - 1300, count)
    for index in range(count):
        start, prompt = int(starts[index]), int(prompts[index])
        turns = [
            {"from": "human", "value": f"{index} " + " ".join(pool[start : start + prompt])},
            {"from": "gpt", "value": " ".join(pool[start + prompt : start + prompt + int(answers[index])])},
        ]
        yield json.dumps({"id": f"identity_{index}", "source": f"task{index % 1825}", "conversations": turns})


def scale(arguments: argparse.Namespace) -> None:
    arguments.directory.mkdir(parents=True, exist_ok=True)
    file = arguments.directory / "flan_like.json"
    if not file.exists():
        with file.open("w", encoding="utf-8") as out:
            for index, record in enumerate(flan_like(arguments.records)):
                out.write(("[\n" if not index else ",\n") + record)
            out.write("\n]\n")
    command = [sys.executable, __file__, "build", "--tokenizer", str(arguments.tokenizer), "--pairs", str(file)]
    command += ["--scratch", str(arguments.directory)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    if arguments.kill_after:
        process = subprocess.Popen(command, env=environment)
        threading.Timer(arguments.kill_after, process.send_signal, [signal.SIGKILL]).start()
        say(killed_with=process.wait(), after_seconds=arguments.kill_after)
    subprocess.run(command, check=True, env=environment)
    subprocess.run(command, check=True, env=environment)


def build(arguments: argparse.Namespace) -> None:
    from flacuna_jax.config.data import DataConfig, SourceConfig
    from flacuna_jax.data.packing import pack
    from flacuna_jax.data.store_cache import cached_store
    from flacuna_jax.huggingface.tokenizer import load_tokenizer, tokenizer_fingerprint

    config = DataConfig(sources=(SourceConfig(path=str(arguments.pairs)),), max_length=MAX_LENGTH)
    tokenizer = load_tokenizer(arguments.tokenizer)
    wall = time.perf_counter()
    store, report = cached_store(
        config,
        tokenizer,
        tokenizer_fingerprint(arguments.tokenizer),
        arguments.scratch / "cache",
        lambda line: say(says=line),
    )
    stored = time.perf_counter()
    plan = pack(store.lengths, MAX_LENGTH, "best_fit", 0, 0)
    tokens = int(store.offsets[-1])
    (source,) = report.sources
    say(
        records=source.read,
        kept=source.kept,
        dropped=dict(source.dropped),
        tokens=tokens,
        file_gib=round(arguments.pairs.stat().st_size / 2**30, 2),
        store_seconds=round(stored - wall, 1),
        pack_seconds=round(time.perf_counter() - stored, 1),
        rows=plan.rows,
        fill=round(tokens / (plan.rows * MAX_LENGTH), 4),
        peak_rss_gib=peak_rss_gib(),
    )


def peak_rss_gib() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


# ---- read


def read(arguments: argparse.Namespace) -> None:
    import numpy as np

    from flacuna_jax.config.data import DataConfig, SourceConfig
    from flacuna_jax.config.training import TrainingConfig
    from flacuna_jax.data.pipeline import BatchStream, StepSource, plan_steps
    from flacuna_jax.data.store_cache import cached_store
    from flacuna_jax.huggingface.tokenizer import load_tokenizer, tokenizer_fingerprint

    config = DataConfig(
        sources=(SourceConfig(path=str(arguments.directory / "flan_like.json")),), max_length=MAX_LENGTH
    )
    store, _ = cached_store(
        config,
        load_tokenizer(arguments.tokenizer),
        tokenizer_fingerprint(arguments.tokenizer),
        arguments.directory / "cache",
        lambda line: say(says=line),
    )
    shards = 4
    plan = plan_steps(store, config, TrainingConfig(batch_size=128, micro_batch_size=2), seed=42, shards=shards)
    if plan.total_steps < arguments.steps + 2:
        raise SystemExit(f"the data has {plan.total_steps} steps; give --steps {plan.total_steps - 2} or less")
    stream = BatchStream(StepSource(store, plan), start_step=0, threads=2, ahead=4)
    first = next(stream)  # packing the epoch and starting the threads are not reading
    tokens, wall, cpu = 0, time.perf_counter(), cpu_seconds()
    for _ in range(arguments.steps):
        tokens += int((next(stream)["segment_ids"] > 0).sum())
    seconds, used = time.perf_counter() - wall, cpu_seconds() - cpu
    following = next(stream)
    stream.close()
    say(
        steps=arguments.steps,
        tokens_per_second=round(tokens / seconds),
        tokens_per_cpu_second=round(tokens / used),
        batch_shape=list(first["tokens"].shape),
        peak_rss_gib=peak_rss_gib(),
    )
    for hosts in (1, 2, 4):
        slices = []
        for host in range(hosts):
            source = StepSource(store, plan, host, hosts)
            one = BatchStream(source, start_step=arguments.steps + 1, threads=2, ahead=4)
            slices.append(next(one))
            one.close()
        same = all(np.array_equal(np.concatenate([s[name] for s in slices], axis=1), following[name]) for name in first)
        say(resumed_on_hosts=hosts, same_batch=bool(same))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    for name, function in (("compare", compare), ("scale", scale), ("read", read)):
        verb = verbs.add_parser(name)
        verb.set_defaults(run=function)
        verb.add_argument("--tokenizer", type=Path, required=True)
        if name == "compare":
            verb.add_argument("--records", type=Path, required=True, help="a FLAN-mini JSON list")
            verb.add_argument("--repeat", type=int, default=1)
            verb.add_argument("--trl-python")
        else:
            verb.add_argument("--directory", type=Path, required=True)
        if name == "scale":
            verb.add_argument("--records", type=int, default=1_340_000)
            verb.add_argument("--kill-after", type=float, default=60.0, help="seconds; 0: never")
        if name == "read":
            verb.add_argument("--steps", type=int, default=100)
    for name, function in (("ours", ours), ("trl", trl), ("build", build)):
        child = verbs.add_parser(name, help=argparse.SUPPRESS)
        child.set_defaults(run=function)
        for option in ("--tokenizer", "--pairs", "--scratch"):
            child.add_argument(option, type=Path, required=True)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
