"""The peer's side of `real_model.py`, transformers and PEFT: one optimizer step, or one decoding, per line of input."""

import functools
import random
import time
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from sides import serve
from train_peer import inputs
from transformers import AutoModelForCausalLM, AutoTokenizer
from workload import Document, Rows, lay

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Peer:
    def __init__(self) -> None:
        self._batches: dict[tuple[str, str], list[dict[str, torch.Tensor]]] = {}
        self._supervised: dict[tuple[str, str], int] = {}

    @functools.cache  # noqa: B019  # lives as long as the process
    def _loaded(self, path: str, dtype: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).to(DEVICE).eval()

    @functools.cache  # noqa: B019
    def _trained(self, path: str, dtype: str) -> tuple[Any, list[torch.nn.Parameter], torch.optim.Optimizer]:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), use_cache=False).to(DEVICE)
        settings = LoraConfig(
            r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        )
        adapted = get_peft_model(model, settings).train()
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        return adapted, trained, torch.optim.AdamW(trained, lr=2e-5)

    def open(self, model: str, dtype: str, mode: str, length: int, documents: list[Any]) -> None:
        self._model_path = model
        laid = [Document(tokens, prompt) for tokens, prompt in map(_document, documents)]
        rows = _packed(laid, length) if mode == "packed" else _alone(laid)
        self._batches[dtype, mode] = [inputs(row, mode, DEVICE) for row in rows]
        self._supervised[dtype, mode] = sum(row.supervised for row in rows)

    def step(self, dtype: str, mode: str) -> float:
        """Supervised tokens per second of an optimizer step over all documents."""
        model, trained, optimizer = self._trained(self._model_path, dtype)
        batches = self._batches[dtype, mode]
        begun = time.perf_counter()
        for leaves in batches:
            with torch.autocast(DEVICE, torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = model(**leaves).loss
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        return self._supervised[dtype, mode] / (time.perf_counter() - begun)

    def generate(self, model: str, dtype: str, prompts: list[str], new_tokens: int) -> dict[str, Any]:
        network, tokenizer = self._loaded(model, dtype), AutoTokenizer.from_pretrained(model, padding_side="left")
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        given = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to(DEVICE)
        begun = time.perf_counter()
        with torch.inference_mode():
            made = network.generate(**given, max_new_tokens=new_tokens, do_sample=False)
        seconds = time.perf_counter() - begun
        new = made[:, given["input_ids"].shape[1] :].tolist()
        end = tokenizer.eos_token_id
        tokens = sum(row.index(end) + 1 if end in row else len(row) for row in new)
        return {"seconds": seconds, "tokens": tokens, "texts": tokenizer.batch_decode(new, skip_special_tokens=True)}


def _document(document: Any) -> tuple[Any, int]:
    ids, mask = document
    return np.asarray(ids, np.int32), mask.index(True)


def _alone(documents: list[Document], size: int = 2) -> list[Rows]:
    """Pairs of documents, padded to the longer one, in a random order as in the peer's trainer."""
    shuffled = [[document] for document in documents]
    random.Random(0).shuffle(shuffled)
    groups = [shuffled[i : i + size] for i in range(0, len(shuffled), size)]
    return [lay(group, max(len(member[0].tokens) for member in group)) for group in groups]


def _packed(documents: list[Document], length: int) -> list[Rows]:
    """One packed row per micro-batch: best fit, longest first."""
    rows: list[list[Document]] = []
    for document in sorted(documents, key=lambda one: -len(one.tokens)):
        room = [length - sum(len(one.tokens) for one in row) - len(document.tokens) for row in rows]
        fitting = [index for index, left in enumerate(room) if left >= 0]
        if fitting:
            rows[min(fitting, key=lambda index: room[index])].append(document)
        else:
            rows.append([document])
    return [lay([row], length) for row in rows]


if __name__ == "__main__":
    serve(Peer())
