"""Measures our step in a separate process; `train_step.py` starts it and reads its JSON output."""

import argparse
import json
import resource
import time
from typing import Any

import jax
import numpy as np
import optax
import stand_in  # noqa: F401  # before flacuna_jax
from measure import matmul_ceiling, median, seconds_of
from workload import CORPORA, SHAPES, TARGETS, Rows, Shape, add_arguments, lay, packed_documents

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import ModelSpec, Params, init_params
from flacuna_jax.model.sharding import batch_sharding, make_mesh
from flacuna_jax.training.network import NetworkConfig
from flacuna_jax.training.state import StateLayout
from flacuna_jax.training.step import StepConfig, make_step


def llama(shape: Shape) -> LlamaConfig:
    return LlamaConfig(
        shape.vocab, shape.hidden, shape.intermediate, shape.layers, shape.heads, shape.heads, shape.head_dim
    )


class Bench:
    """Weights and data of one process, for several variants of the step."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.shape = arguments, SHAPES[arguments.shape]
        lora = LoraConfig(rank=8, alpha=16.0, dropout=arguments.dropout, targets=TARGETS[arguments.targets])
        self.spec = ModelSpec(llama(self.shape), lora, arguments.dtype, arguments.dtype)
        self.mesh = make_mesh("auto", jax.devices()[:1])
        self.optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(2e-5))
        self.layout = StateLayout(self.spec, self.optimizer, self.mesh)
        self.base: Params = init_params(self.spec, self.spec.base, 0, self.mesh)
        corpus = CORPORA[arguments.corpus]
        self.rows = [
            lay(packed_documents(corpus, self.shape.vocab, arguments.rows, arguments.length, seed), arguments.length)
            for seed in range(arguments.batches)
        ]

    def measure(self, remat: str, micro_batch: int, budget: float) -> dict[str, Any]:
        """Compiles and times the step; in whole rounds over the batches, so that every packing has the same weight."""
        state = self.layout.begin(self.layout.fresh_adapters(1))
        config = StepConfig(NetworkConfig(self.spec, remat=remat))
        step = make_step(config, self.optimizer, self.mesh, self.layout.shardings)
        placed = [self._placed(rows, micro_batch) for rows in self.rows]
        carry = [state.trainable, state.opt_state]

        started = time.perf_counter()
        with jax.set_mesh(self.mesh):
            lowered = step.jitted.lower(*carry, self.base, placed[0], np.int32(0))  # type: ignore[attr-defined]
            traced = time.perf_counter()
            compiled = lowered.compile()
        compile_seconds = time.perf_counter() - traced
        losses: list[float] = []

        def one_round(_: int = 0) -> None:
            for index, batch in enumerate(placed):
                trainable, opt_state, metrics = compiled(*carry, self.base, batch, np.int32(index))
                carry[:] = trainable, opt_state
            losses.append(float(metrics.loss))

        one_round()
        if self.arguments.profile:
            with jax.profiler.trace(self.arguments.profile):
                one_round()
        spent = seconds_of(one_round, budget, least=2)
        seconds = median(spent) / len(placed)
        mean = {
            n: float(np.mean([getattr(rows, n) for rows in self.rows])) for n in ("live", "supervised", "documents")
        }
        memory: Any = compiled.memory_analysis()
        return {
            "remat": remat,
            "micro_batch": micro_batch,
            "step_seconds": seconds,
            "spread": (max(spent) - min(spent)) / median(spent),
            "tokens_per_second": mean["live"] / seconds,
            "supervised_per_second": mean["supervised"] / seconds,
            "documents_per_second": mean["documents"] / seconds,
            "fill": mean["live"] / (self.arguments.rows * self.arguments.length),
            "model_flops_per_second": 4 * self.shape.matrix_parameters * mean["live"] / seconds,
            "trace_seconds": traced - started,
            "compile_seconds": compile_seconds,
            "memory_gb": (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e9,
            "temporaries_gb": memory.temp_size_in_bytes / 1e9,
            "process_peak_gb": _peak_bytes() / 1e9,
            "loss": losses[0],
        }

    def _placed(self, rows: Rows, micro_batch: int) -> dict[str, jax.Array]:
        return {n: jax.device_put(leaf, batch_sharding(self.mesh)) for n, leaf in rows.step_batch(micro_batch).items()}


def _peak_bytes() -> int:
    """Peak memory of the device since the start of the process; on a CPU, of the process."""
    statistics = jax.devices()[0].memory_stats() or {}
    return statistics.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--variants", nargs="+", default=["dots:2"], metavar="REMAT:MICRO_BATCH")
    parser.add_argument("--profile", help="directory for a profile of one round")
    arguments = parser.parse_args()
    ceiling = matmul_ceiling(arguments.dtype)
    bench = Bench(arguments)
    results = []
    for variant in arguments.variants:
        remat, micro_batch = variant.split(":")
        try:
            results.append(bench.measure(remat, int(micro_batch), arguments.budget))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            results.append({"remat": remat, "micro_batch": int(micro_batch), "failed": "out of memory"})
    print(json.dumps({"ceiling_flops_per_second": ceiling, "variants": results}), flush=True)


if __name__ == "__main__":
    main()
