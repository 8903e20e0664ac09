"""Measures the peer, transformers and PEFT, on the same shapes and documents, all modes in one process; see
`train_step.py`.

Modes: `padded`, a document per row padded to the full length, as in the original training; `longest`, padded to the
longest of a micro-batch; `packed`, whole rows with restarting positions, from which transformers derives its mask. Each
with and without gradient checkpointing. Attention is torch's scaled_dot_product_attention.
"""

import argparse
import json
import random
import resource
from typing import Any

import torch
from measure import median, seconds_of
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from workload import CORPORA, SHAPES, TARGETS, Rows, Shape, add_arguments, lay, packed_documents

MODES = ("padded", "longest", "packed")
PADDED_MICRO_BATCHES = 2
ALL_MODES = [f"{mode}{suffix}" for mode in MODES for suffix in ("", "+checkpointing")]


def build(shape: Shape, targets: tuple[str, ...], dtype: torch.dtype, dropout: float, device: str) -> torch.nn.Module:
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(previous)
    settings = LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=list(targets), task_type="CAUSAL_LM")
    return get_peft_model(model, settings).train()


def micro_batches(mode: str, arguments: argparse.Namespace) -> list[Rows]:
    """The documents of our batches: as whole rows, or shuffled with a document per row."""
    corpus, shape = CORPORA[arguments.corpus], SHAPES[arguments.shape]
    size, length = arguments.micro_batch, arguments.length
    rows = [
        row
        for seed in range(arguments.batches)
        for row in packed_documents(corpus, shape.vocab, arguments.rows, length, seed)
    ]
    if mode == "packed":
        return [lay(rows[i : i + size], length) for i in range(0, len(rows), size)]
    alone = [[document] for row in rows for document in row]
    random.Random(0).shuffle(alone)
    groups = [alone[i : i + size] for i in range(0, len(alone) - size + 1, size)]
    if mode == "padded":
        # Every micro-batch takes the same time, independent of its documents.
        return [lay(group, length) for group in groups[:PADDED_MICRO_BATCHES]]
    return [lay(group, max(len(member[0].tokens) for member in group)) for group in groups]


def inputs(rows: Rows, mode: str, device: str) -> dict[str, torch.Tensor]:
    leaves = {"input_ids": rows.tokens, "labels": rows.labels}
    if mode == "packed":
        leaves["position_ids"] = rows.positions
    else:
        leaves["attention_mask"] = (rows.segments > 0).astype("int64")
    return {name: torch.as_tensor(leaf).long().to(device) for name, leaf in leaves.items()}


def measure(mode: str, checkpointing: bool, model: Any, arguments: argparse.Namespace, device: str) -> dict[str, Any]:
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    else:
        model.gradient_checkpointing_disable()
    rows = micro_batches(mode, arguments)
    placed = [inputs(of, mode, device) for of in rows]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-5)
    autocast = torch.autocast(device, torch.bfloat16, enabled=arguments.dtype == "bfloat16")

    def work(chosen: list[dict[str, torch.Tensor]]) -> float:
        for leaves in chosen:
            with autocast:
                loss = model(**leaves).loss
            (loss / len(placed)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    try:
        loss = work([placed[0], placed[-1]])
        seconds = median(seconds_of(lambda _: work(placed), arguments.budget, least=1))
    except torch.OutOfMemoryError:
        optimizer.zero_grad()
        torch.cuda.empty_cache()
        return {"failed": "out of memory"}
    per_second = sum(of.documents for of in rows) / seconds
    everything = micro_batches("packed", arguments)
    count = sum(of.documents for of in everything)
    return {
        "tokens_per_second": per_second * sum(of.live for of in everything) / count,
        "supervised_per_second": per_second * sum(of.supervised for of in everything) / count,
        "documents_per_second": per_second,
        "fill": sum(of.live for of in rows) / sum(of.tokens.size for of in rows),
        "process_peak_gb": _peak_bytes(device) / 1e9,
        "loss": loss,
    }


def _peak_bytes(device: str) -> int:
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--modes", nargs="+", default=ALL_MODES)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = SHAPES[arguments.shape]
    model = build(shape, TARGETS[arguments.targets], getattr(torch, arguments.dtype), arguments.dropout, device)
    results = {}
    for mode in arguments.modes:
        name, _, checkpointing = mode.partition("+")
        results[mode] = measure(name, bool(checkpointing), model, arguments, device)
    print(json.dumps({"modes": results}), flush=True)


if __name__ == "__main__":
    main()
