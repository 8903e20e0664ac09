"""Our side of `real_model.py`: one optimizer step of a run, or one decoding, per line of input."""

import contextlib
import functools
import json
import time
from pathlib import Path
from typing import Any

from sides import serve

from flacuna_jax import ChatModel, Decoding, TrainingRun, load_model, open_run, parse_config


class Ours:
    def __init__(self) -> None:
        self.runs: dict[str, TrainingRun] = {}
        self._open = contextlib.ExitStack()

    def open_run(self, dtype: str, directory: str, model: str, records: str, length: int, rows: int) -> list[Any]:
        """Opens a run, and returns the documents of one step: tokens, and the number without loss in front."""
        config = parse_config(
            {
                "output_dir": directory,
                "model": {"path": model, "dtype": dtype},
                "lora": {"rank": 8, "alpha": 16, "dropout": 0.05, "targets": ["q_proj", "v_proj"]},
                "data": {"sources": [{"path": records}], "max_length": length},
                "training": {"epochs": 10, "batch_unit": "rows", "batch_size": rows, "micro_batch_size": 1},
                "logging": {"every_steps": 1, "tensorboard": False},
                "checkpoint": {"every_steps": 1_000_000},
                "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
            }
        )
        run = self._open.enter_context(open_run(config, say=lambda _: None))
        self.runs[dtype] = run
        store, plan = run.setup.store, run.setup.plan
        documents = []
        for index in range(2 * plan.rows_per_step * plan.examples // plan.rows):
            example = store.example(index)
            documents.append([example.ids.tolist(), example.loss_mask.tolist()])
        return documents

    def step(self, dtype: str) -> float:
        """Supervised tokens per second of the next step, from the call to the result."""
        run = self.runs[dtype]
        begun = time.perf_counter()
        run.train(until=run.step + 1)
        seconds = time.perf_counter() - begun
        lines = (Path(run.setup.config.output_dir) / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["supervised_tokens"] / seconds

    @functools.cache  # noqa: B019  # lives as long as the process
    def _model(self, path: str, dtype: Any) -> ChatModel:
        return load_model(path, dtype=dtype, batch_size=16)

    def generate(self, model: str, dtype: str, prompts: list[str], new_tokens: int) -> dict[str, Any]:
        chat = self._model(model, dtype)
        begun = time.perf_counter()
        answers = chat.generate(prompts, Decoding(max_new_tokens=new_tokens))
        seconds = time.perf_counter() - begun
        tokens = sum(answer.tokens + (answer.finish == "eos") for answer in answers)
        return {"seconds": seconds, "tokens": tokens, "texts": [answer.text for answer in answers]}


if __name__ == "__main__":
    serve(Ours())
