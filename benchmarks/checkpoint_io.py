"""Memory and speed of checkpoint operations at the size of Vicuna-13B, compared with `cp` of the same bytes.

    python benchmarks/checkpoint_io.py --directory /scratch            # 26 GB, needs 55 GB of disk
    python benchmarks/checkpoint_io.py --directory /scratch --layers 6 --peft   # real widths, 4.5 GB

Writes a synthetic checkpoint (random half-precision weights, real shapes, 5 GB shards), then copies, converts and
merges it, one operation at a time, and deletes the results. Every operation, including cp, begins with nothing of the
source in memory and ends with its data on the disk (sync). convert and merge include reading everything back from
the disk, merge also the logits of both sides. cp runs before and after the others, which are compared with the faster
of the two. With --peft the model is also loaded, merged and saved by PEFT (merge_and_unload,
save_pretrained), in memory; with --golden, 8 tokens are generated from the files for 3 prompts of 45 tokens, which an
export does in addition to merging. Prints one JSON object per line; peak_anonymous_gib excludes mapped file pages,
which the kernel can reclaim.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.huggingface.adapter import Adapter
from flacuna_jax.huggingface.architecture import hugging_face_config
from flacuna_jax.huggingface.deliver import Companions, convert, write_adapter, write_merged
from flacuna_jax.huggingface.files.read import open_checkpoint
from flacuna_jax.huggingface.files.tensors import TensorReader, forget
from flacuna_jax.huggingface.merged import PendingTensor, write_shards
from flacuna_jax.huggingface.probe import stored_weights, streamed_greedy
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import ModelSpec, base_parameters

VICUNA_13B = LlamaConfig(
    vocab_size=32000, hidden_size=5120, intermediate_size=13824, num_layers=40,
    num_heads=40, num_kv_heads=40, head_dim=128,
)  # fmt: skip
HALF = np.dtype(np.float16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="directory with enough space for two copies")
    parser.add_argument("--layers", type=int, default=VICUNA_13B.num_layers)
    parser.add_argument("--peft", action="store_true", help="compare with PEFT; the model must fit into memory twice")
    parser.add_argument("--golden", action="store_true", help="also the answers of golden prompts")
    arguments = parser.parse_args()
    config = dataclasses.replace(VICUNA_13B, num_layers=arguments.layers)
    arguments.directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        run(Path(scratch), config, arguments.peft, arguments.golden)


def run(scratch: Path, config: LlamaConfig, with_peft: bool, with_golden: bool) -> None:
    source = scratch / "source"
    nbytes = make_checkpoint(source, config)
    adapter = random_adapter(config)

    def copy() -> None:
        subprocess.run(["cp", "-r", source, scratch / "copy"], check=True)

    def converted() -> None:
        convert(scratch / "native", open_checkpoint(source, once=True), config, tokenizer_source=source)

    def merged() -> None:
        reader = open_checkpoint(source, once=True)
        write_merged(scratch / "merged", reader, config, adapter, Companions(source, None, {}))

    def merged_by_peft() -> None:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16)
        PeftModel.from_pretrained(model, scratch / "adapter").merge_and_unload().save_pretrained(scratch / "peft")

    crossings: list[tuple[str, Callable[[], None], str]]
    crossings = [("cp", copy, "copy"), ("convert", converted, "native"), ("merge", merged, "merged")]
    if with_peft:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        write_adapter(scratch / "adapter", adapter, config, trained=True)
        crossings.append(("merge by PEFT", merged_by_peft, "peft"))

    if with_golden:
        crossings.append(("golden prompts", lambda: golden_prompts(open_checkpoint(source, once=True), config), "none"))
    crossings.append(("cp again", copy, "copy"))
    measured = [(name, *measured_crossing(crossing, source, scratch / output)) for name, crossing, output in crossings]
    baseline = min(seconds for name, seconds, _ in measured if name.startswith("cp"))
    for name, seconds, peak in measured:
        facts = {
            "crossing": name,
            "layers": config.num_layers,
            "gigabytes": round(nbytes / 1e9, 2),
            "seconds": round(seconds, 1),
            "gigabytes_per_second": round(nbytes / 1e9 / seconds, 3),
            "ratio_to_cp": round(baseline / seconds, 3),
            "peak_anonymous_gib": round(peak / 2**30, 3),
        }
        print(json.dumps(facts), flush=True)


def measured_crossing(work: Callable[[], None], source: Path, output: Path) -> tuple[float, int]:
    for file in source.iterdir():
        with file.open("rb") as opened:
            forget(opened.fileno())
    seconds, peak = measure(work)
    print(f"{output.name}: {seconds:.1f} s", file=sys.stderr, flush=True)
    shutil.rmtree(output, ignore_errors=True)
    return seconds, peak


def golden_prompts(reader: TensorReader, config: LlamaConfig) -> None:
    prompts = np.random.default_rng(2).integers(3, config.vocab_size, (3, 45)).tolist()
    streamed_greedy(stored_weights(reader, config), config, prompts, 8)


def make_checkpoint(path: Path, config: LlamaConfig) -> int:
    path.mkdir()
    noise = (np.random.default_rng(0).standard_normal(1 << 24) * 0.02).astype(HALF)

    def filled(shape: tuple[int, ...]) -> Callable[[slice], np.ndarray]:
        return lambda rows: np.resize(noise, (rows.stop - rows.start, *shape[1:]))

    tensors = []
    for parameter in base_parameters(config).values():
        for name in parameter.tensors:
            tensors.append(PendingTensor(name, parameter.layer_shape, HALF, filled(parameter.layer_shape)))
    list(write_shards(path, tensors))
    (path / "config.json").write_text(json.dumps(hugging_face_config(config, HALF)))
    return sum(tensor.nbytes for tensor in tensors)


def random_adapter(config: LlamaConfig) -> Adapter:
    rng = np.random.default_rng(1)
    spec = ModelSpec(config, LoraConfig())
    shapes = spec.lora_shapes
    return Adapter(spec, {path: (rng.standard_normal(s) * 1e-3).astype(np.float32) for path, s in shapes.items()})


def measure(work: Callable[[], None]) -> tuple[float, int]:
    """Seconds until the result is on the disk, and the peak increase of anonymous memory in bytes."""
    os.sync()
    before = anonymous_memory()
    with sampled(anonymous_memory) as samples:
        started = time.monotonic()
        work()
        os.sync()
        seconds = time.monotonic() - started
    return seconds, max(samples) - before


@contextlib.contextmanager
def sampled(read: Callable[[], int], every: float = 0.005) -> Iterator[list[int]]:
    samples, done = [read()], threading.Event()

    def watch() -> None:
        while not done.wait(every):
            samples.append(read())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield samples
    finally:
        done.set()
        watcher.join()


def anonymous_memory() -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
