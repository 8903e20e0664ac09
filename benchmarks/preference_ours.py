"""Our side of `preference.py`: one epoch of DPO per line of input."""

import contextlib
import json
import resource
import time
from pathlib import Path
from typing import Any

from sides import serve

from flacuna_jax import open_run, parse_config


class Ours:
    def __init__(self) -> None:
        self._open = contextlib.ExitStack()

    def open(
        self,
        model: str,
        pairs: list[dict[str, str]],
        dtype: str,
        length: int,
        batch: int,
        rounds: int,
        directory: str,
        micro_batch: int,
        remat: str,
    ) -> list[Any]:
        """Opens a run, and returns the documents of all pairs: token ids, and the number without loss in front."""
        data = Path(directory) / "pairs.json"
        data.write_text(json.dumps(pairs))
        config = parse_config(
            {
                "output_dir": f"{directory}/run",
                "model": {"path": model, "dtype": dtype},
                "lora": {"rank": 8, "alpha": 16.0, "dropout": 0.0, "targets": ["q_proj", "v_proj"]},
                "data": {"sources": [{"path": str(data)}], "max_length": length},
                "training": {
                    "objective": {"name": "dpo"},
                    "epochs": 1 + rounds,
                    "batch_size": batch,
                    "micro_batch_size": micro_batch,
                    "learning_rate": 1e-4,
                    "remat": remat,
                },
                "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
                "checkpoint": {"every_steps": 1_000_000},
                "logging": {"every_steps": 1, "tensorboard": False},
            }
        )
        self._run = self._open.enter_context(open_run(config, say=lambda _: None))
        store = self._run.setup.store
        self._supervised = int(store.supervised.sum())
        documents = [document for index in range(len(store)) for document in store.example(index).documents]
        return [_up_to_its_end(document.ids.tolist(), document.loss_mask.tolist()) for document in documents]

    def epoch(self) -> dict[str, float]:
        """The next epoch, from the call to its results."""
        run = self._run
        epoch = next(epoch for epoch in run.setup.plan.epochs if epoch.first_step == run.step)
        begun = time.perf_counter()
        run.train(until=run.step + epoch.steps)
        seconds = time.perf_counter() - begun
        lines = (Path(run.setup.config.output_dir) / "metrics.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines[-epoch.steps :]]
        return {
            "seconds": seconds,
            "supervised": self._supervised,
            "loss": sum(losses) / len(losses),
            "process_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        }


def _up_to_its_end(ids: list[int], mask: list[bool]) -> list[Any]:
    """Without what the template writes after the end of the answer."""
    return [ids[: len(mask) - mask[::-1].index(True)], mask.index(True)]


if __name__ == "__main__":
    serve(Ours())
