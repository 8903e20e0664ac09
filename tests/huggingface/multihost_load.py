"""One host of two that loads a checkpoint split over both; run by test_multihost_load.py.

Arguments: port, process id, directory. Prints a JSON object: bytes of the slices that were read from tensors, bytes of
the files that the process has mapped in memory (RssFile), and for each parameter a sum over its own shards.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from flacuna_jax.config.run import MeshConfig
from flacuna_jax.huggingface import load
from flacuna_jax.huggingface.architecture import read_architecture
from flacuna_jax.model.parameters import base_parameters
from flacuna_jax.model.sharding import make_mesh, parameter_shardings


def touched_file_pages() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
    return int(line.split()[1]) * 1024


def main(port: str, process: str, directory: str) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=int(process))
    config = read_architecture(directory)
    shardings = parameter_shardings(base_parameters(config), make_mesh(MeshConfig(fsdp=4)))
    taken = 0
    original = load.cast

    def counting(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
        nonlocal taken
        taken += array.nbytes
        return original(array, dtype)

    load.cast = counting
    jax.block_until_ready(jax.jit(lambda: 1)())
    before = touched_file_pages()
    params = load.load_base(directory, config, shardings, "float32")
    touched = touched_file_pages() - before
    sums = {
        path: [
            [str(shard.index), float(np.asarray(shard.data, np.float64).sum())] for shard in value.addressable_shards
        ]
        for path, value in params.items()
    }
    print(json.dumps({"taken": taken, "touched": touched, "sums": sums}))


if __name__ == "__main__":
    main(*sys.argv[1:])
