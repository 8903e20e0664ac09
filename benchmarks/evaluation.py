"""Compares evaluation with lm-evaluation-harness's Hugging Face backend and transformers' generate, in one run.

    python -m benchmarks.evaluation --data DIR [--subjects 4] [--questions 40]

DIR contains `mmlu/data/{dev,val}` (or test) and `llama_tokenizer/`. Both sides get the same randomly drawn LLaMA
(float32, on all cores of the CPU) and the same token ids: MMLU 5-shot as in the harness, four one-token answers per
question, and greedy decoding of prompts of mixed lengths. The time is that of the second pass over the same requests,
so that compilation and a cold start do not count; the first pass is reported too.
"""

import argparse
import dataclasses
import gc
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import lm_eval.models.huggingface
import numpy as np
import torch
import transformers
from lm_eval.api.instance import Instance

from flacuna_jax.evaluation import mmlu
from flacuna_jax.evaluation.harness import HarnessModel
from flacuna_jax.generation.engine import LlamaLanguageModel
from flacuna_jax.generation.language_model import GenerationRequest
from flacuna_jax.generation.settings import Placement
from flacuna_jax.huggingface.architecture import read_architecture
from flacuna_jax.huggingface.load import load_base
from flacuna_jax.huggingface.tokenizer import load_tokenizer
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.model.sharding import make_mesh, parameter_shardings


@dataclasses.dataclass(frozen=True)
class Timing:
    first: float
    second: float


def make_checkpoint(directory: Path, tokenizer: Path, hidden: int, layers: int) -> None:
    """A LLaMA of the given size with random weights, and the real tokenizer."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    for file in tokenizer.iterdir():
        if file.name.startswith(("tokenizer", "special_tokens")):
            (directory / file.name).write_bytes(file.read_bytes())


def load_ours(directory: Path) -> LlamaLanguageModel:
    config = read_architecture(directory)
    spec = ModelSpec(config, None, "float32", "float32")
    mesh = make_mesh("auto", jax.devices()[:1])
    params = load_base(str(directory), config, parameter_shardings(spec.base, mesh), "float32")
    return LlamaLanguageModel(spec, params, load_tokenizer(directory), mesh, placement=Placement(row_tokens=2048))


def mmlu_requests(data: Path, subjects: int, questions: int) -> list[Instance]:
    """The harness's requests: description, five worked examples, question; the continuations " A" to " D"."""
    split = "test" if list(data.glob("mmlu/data/test/*.csv")) else "val"
    task = mmlu.load(data, 5, split)
    asked: dict[str, int] = {}
    requests = []
    for problem in task.problems:
        asked[problem.group] = asked.get(problem.group, 0) + 1
        if len(asked) <= subjects and asked[problem.group] <= questions:
            for index, letter in enumerate(mmlu.LETTERS):
                arguments = (problem.corrected.prompt(5), f" {letter}")
                requests.append(Instance("loglikelihood", {}, arguments, index))
    return requests


def timed(run: Callable[[], Any]) -> tuple[Timing, Any]:
    seconds = []
    for _ in range(2):
        gc.collect()
        begin = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - begin)
    return Timing(*seconds), result


def compare_scoring(directory: Path, requests: list[Instance], batch: int) -> dict[str, Any]:
    ours = HarnessModel(load_ours(directory))
    their_time, expected = score_with_hf(directory, requests, batch, ours)
    our_time, scores = timed(lambda: ours.loglikelihood(requests, disable_tqdm=True))
    apart = max(abs(a[0] - b[0]) for a, b in zip(scores, expected, strict=True))
    return report("MMLU 5-shot log-likelihoods", len(requests), our_time, their_time) | {"largest_difference": apart}


def score_with_hf(
    directory: Path, requests: list[Instance], batch: int, ours: HarnessModel
) -> tuple[Timing, list[tuple[float, bool]]]:
    theirs = lm_eval.models.huggingface.HFLM(
        pretrained=str(directory), device="cpu", dtype="float32", batch_size=batch, add_bos_token=True
    )
    # transformers loads this SentencePiece model differently, so pass the same ids to both sides.
    theirs.tok_encode = ours.tok_encode
    return timed(lambda: theirs.loglikelihood(requests, disable_tqdm=True))


def compare_generation(directory: Path, prompts: int, new: int, batch: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    texts = [[1, *rng.integers(3, 32000, n).tolist()] for n in rng.integers(16, 512, prompts)]
    their_time, expected = generate_with_transformers(directory, texts, new, batch)
    ours = load_ours(directory)
    requests = [GenerationRequest(tuple(text), new) for text in texts]
    our_time, answers = timed(lambda: ours.generate(requests))
    decoded = [ours.tokenizer.decode(row[: row.index(2)] if 2 in row else row) for row in expected]
    same = sum(a.text == b for a, b in zip(answers, decoded, strict=True))
    return report("greedy generation, mixed lengths", prompts, our_time, their_time) | {"identical_texts": same}


def generate_with_transformers(
    directory: Path, texts: list[list[int]], new: int, batch: int
) -> tuple[Timing, list[list[int]]]:
    """Batches of similar lengths, padded at the left, which is an efficient use of transformers."""
    model = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))

    def run() -> list[list[int]]:
        answers: dict[int, list[int]] = {}
        for begin in range(0, len(texts), batch):
            indices = order[begin : begin + batch]
            width = max(len(texts[i]) for i in indices)
            ids = torch.tensor([[0] * (width - len(texts[i])) + texts[i] for i in indices])
            mask = torch.tensor([[0] * (width - len(texts[i])) + [1] * len(texts[i]) for i in indices])
            with torch.inference_mode():
                out = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
            answers |= {i: row[width:].tolist() for i, row in zip(indices, out, strict=True)}
        return [answers[i] for i in range(len(texts))]

    return timed(run)


def report(what: str, requests: int, ours: Timing, theirs: Timing) -> dict[str, Any]:
    return {
        "what": what,
        "requests": requests,
        "ours_per_second": requests / ours.second,
        "theirs_per_second": requests / theirs.second,
        "speedup": theirs.second / ours.second,
        "ours_seconds": dataclasses.asdict(ours),
        "theirs_seconds": dataclasses.asdict(theirs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--subjects", type=int, default=3)
    parser.add_argument("--questions", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--batch", type=int, default=8, help="batch size of the reference; ours packs by tokens")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "model"
        make_checkpoint(directory, arguments.data / "llama_tokenizer", arguments.hidden, arguments.layers)
        requests = mmlu_requests(arguments.data, arguments.subjects, arguments.questions)
        print(json.dumps(compare_scoring(directory, requests, arguments.batch), indent=1), flush=True)
        generation = compare_generation(directory, arguments.prompts, arguments.new_tokens, arguments.batch)
        print(json.dumps(generation, indent=1))


if __name__ == "__main__":
    main()
