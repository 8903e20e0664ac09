"""Two processes on loopback load one checkpoint in every format: each reads only its own slices."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flacuna_jax.huggingface.architecture import hugging_face_config
from flacuna_jax.huggingface.deliver import convert
from flacuna_jax.huggingface.files.read import open_checkpoint
from flacuna_jax.huggingface.merged import model_tensors, write_shards
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import ModelSpec
from tests.tiny import SMALL

SIZES = {"num_layers": 4, "hidden_size": 1024, "intermediate_size": 2816, "head_dim": 64, "vocab_size": 4000}
CONFIG = dataclasses.replace(SMALL, num_heads=16, num_kv_heads=16, **SIZES)
HALF = np.dtype(np.float16)


def write_source(path: Path, config: LlamaConfig) -> dict[str, np.ndarray]:
    noise = np.random.default_rng(0).standard_normal(1 << 18).astype(HALF)
    params = {name: np.resize(noise * HALF.type(0.02), shape) for name, shape in ModelSpec(config).base_shapes.items()}
    path.mkdir()
    list(write_shards(path, model_tensors(params, config, HALF), 50_000_000))
    (path / "config.json").write_text(json.dumps(hugging_face_config(config, HALF)))
    return params


def load_on_two(directory: Path) -> list[dict]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    script = Path(__file__).with_name("multihost_load.py")
    hosts = [
        subprocess.Popen(
            [sys.executable, str(script), port, str(host), str(directory)],
            env=environment,
            cwd=script.parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        for host in range(2)
    ]
    try:
        return [json.loads(host.communicate(timeout=120)[0].splitlines()[-1]) for host in hosts]
    finally:
        for host in hosts:
            host.kill()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to see which pages were touched")
@pytest.mark.parametrize("form", ["safetensors", "native"])
def test_each_host_reads_only_its_slices(form: str, tmp_path: Path) -> None:
    params = write_source(tmp_path / "source", CONFIG)
    directory = tmp_path / "source"
    if form == "native":
        directory = tmp_path / "native"
        convert(directory, open_checkpoint(tmp_path / "source"), CONFIG, tokenizer_source=tmp_path / "source")
    total = sum(value.nbytes for value in params.values())
    matrices = sum(value.nbytes for name, value in params.items() if "norm" not in name)
    hosts = load_on_two(directory)
    for host in hosts:
        # Half of every matrix; norms are whole on each of the two devices of a host.
        assert matrices / 2 <= host["taken"] <= matrices / 2 + 2 * (total - matrices)
        # The kernel maps a few pages around each accessed one.
        assert host["touched"] < 0.65 * total
    seen = {name: {} for name in params}
    for host in hosts:
        for name, shards in host["sums"].items():
            seen[name] |= dict(shards)
    for name, value in params.items():
        assert sum(seen[name].values()) == pytest.approx(value.astype(np.float64).sum(), abs=1e-6), name
