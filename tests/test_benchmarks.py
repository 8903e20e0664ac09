"""The benchmarks run with only jax, flax and optax, and both sides of a comparison get the same input."""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from flacuna_jax.kernels import tiles
from flacuna_jax.kernels.attention_reference import visible_bqk
from flacuna_jax.kernels.packed_mask import make_packed_mask

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

WITHOUT = """
import runpy, sys
for name in ("pydantic", "grain", "datasets", "orbax", "orbax.checkpoint", "transformers", "torch"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
sys.path.insert(0, str(__import__("pathlib").Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def benchmark_module(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_our_step_runs_with_nothing_but_jax_flax_and_optax():
    arguments = ["--shape", "tiny", "--corpus", "tiny", "--length", "64", "--rows", "2", "--batches", "1"]
    command = [sys.executable, "-c", WITHOUT, str(BENCHMARKS / "train_ours.py"), *arguments, "--budget", "0.1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout.splitlines()[-1])["variants"]
    assert found["tokens_per_second"] > found["supervised_per_second"] > 0
    assert 5 < found["loss"] < 8  # random weights, 512 tokens: ln 512 is 6.2


def test_both_sides_get_the_same_documents(benchmark_module):
    workload = benchmark_module("workload")
    pytest.importorskip("peft")
    peer = benchmark_module("train_peer")
    arguments = argparse.Namespace(corpus="tiny", shape="tiny", micro_batch=2, length=128, rows=4, batches=2)
    ours = [
        document
        for seed in range(2)
        for row in workload.packed_documents(workload.CORPORA["tiny"], 512, 4, 128, seed)
        for document in row
    ]
    packed, alone = (peer.micro_batches(mode, arguments) for mode in ("packed", "longest"))
    assert sum(rows.documents for rows in packed) == len(ours)
    assert sum(rows.supervised for rows in packed) == sum(document.supervised for document in ours)
    assert len(ours) - sum(rows.documents for rows in alone) in (0, 1)  # an odd one out
    for rows in peer.micro_batches("padded", arguments):
        assert rows.tokens.shape == (2, 128)


def test_targets_are_labels_shifted_by_one(benchmark_module):
    workload = benchmark_module("workload")
    rows = workload.lay(workload.packed_documents(workload.CORPORA["tiny"], 512, 2, 128, 0), 128)
    batch = {name: leaf[0] for name, leaf in rows.step_batch(2).items()}
    assert batch["loss_mask"].sum() == rows.supervised
    at = np.argwhere(batch["loss_mask"])
    assert all(batch["targets"][row, place] == rows.labels[row, place + 1] for row, place in at)
    assert all(batch["segment_ids"][row, place] == batch["segment_ids"][row, place + 1] for row, place in at)


def test_flops_count_the_visible_pairs(benchmark_module):
    attention = benchmark_module("attention")
    segments = attention.packed_segments(3, 96, 20)
    mask = make_packed_mask(segments)
    assert attention.visible_pairs(segments) == int(visible_bqk(mask).sum())
    assert attention.visible_pairs(attention.packed_segments(2, 96, None)) == 2 * 96 * 97 // 2


def test_a_measured_tile_is_preferred(benchmark_module, tmp_path, monkeypatch):
    """The kernels use the accepted tiles, but only on that device and with that head_dim."""
    table = tmp_path / "tiles.json"
    table.write_text("{}")
    tuner = benchmark_module("tune_attention")
    monkeypatch.setattr(tuner, "MEASURED", table)
    monkeypatch.setattr(tiles, "MEASURED", table)
    sizes = {"queries": 64, "keys": 32, "warps": 4, "stages": 3}
    times = {"pallas_gpu": 0.002, "tokamax": 0.001}
    of_dim = {"best": dict.fromkeys(tuner.KERNELS, sizes), "timed": [], "seconds": times}
    found = {"device_kind": "NVIDIA H200", "dims": {"128": of_dim}}
    before = tiles.gpu_tiles("NVIDIA H200", 64, "bfloat16")
    tuner.accept(found)
    tiles._measured_table.cache_clear()
    try:
        assert tiles.gpu_tiles("NVIDIA H200", 128, "bfloat16").dq == tiles.GpuTile(**sizes)
        assert tiles.gpu_tiles("NVIDIA H200", 96, "bfloat16").dq == tiles.GpuTile(**sizes)
        assert tiles.gpu_tiles("NVIDIA H200", 64, "bfloat16") == before
        assert tiles.measured_seconds("NVIDIA H200", 96, "bfloat16") == times
        assert tiles.measured_seconds("NVIDIA H200", 64, "bfloat16") == {}
        assert tiles.measured_seconds("NVIDIA H200", 128, "float32") == {}
        assert tiles.gpu_tiles("NVIDIA H200", 128, "float32").dq != tiles.GpuTile(**sizes)
        assert tiles.gpu_tiles("NVIDIA A100-SXM4-80GB", 128, "bfloat16").dq != tiles.GpuTile(**sizes)
    finally:
        tiles._measured_table.cache_clear()


def test_the_table_of_measured_tiles_is_complete():
    for kernels in (kernels for of_kind in tiles._measured_table().values() for kernels in of_kind.values()):
        assert set(kernels) - {"seconds"} == {"forward", "dq", "dkv"}


def test_results_are_named_after_device_and_day(benchmark_module):
    collect = benchmark_module("collect")
    assert collect.file_name({"device": "NVIDIA H200", "date": "2026-11-22"}) == "nvidia-h200-2026-11-22.json"


def test_a_step_that_exceeds_a_limit_is_named(benchmark_module):
    compiled_step = benchmark_module("compiled_step")
    row = compiled_step.Row("4xa6000", {"fsdp": 4}, 2, most_gb=22)
    good = {"together": 21e9, "products_per_layer": 14, "seconds": 5.0}
    assert compiled_step.judged(row, good) == []
    bad = {"together": 23e9, "products_per_layer": 19, "seconds": 30.0}
    assert compiled_step.judged(row, bad) == ["more than 22 GB", "products", "more than 20 s"]
    assert compiled_step.judged(row, {"failed": "no compiler"}) == ["no compiler"]


def test_forms_of_a_product_are_the_same_product(benchmark_module):
    products = benchmark_module("products")
    rng = np.random.default_rng(0)
    x, matrix, cotangent = (rng.standard_normal(shape).astype(np.float32) for shape in [(5, 8), (6, 8), (5, 6)])
    forward, of_x, of_matrix = x @ matrix.T, cotangent @ matrix, cotangent.T @ x
    expected = [forward, forward, forward, of_x, of_x, of_matrix, of_matrix]
    for form, result in zip(products.FORMS.values(), expected, strict=True):
        np.testing.assert_allclose(form(x, matrix, cotangent), result, rtol=1e-5, atol=1e-5)
    for form in products.OF_ONE_TOKEN.values():
        np.testing.assert_allclose(form(x[:1], matrix, cotangent), x[:1] @ matrix.T, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_first_looks_are_taken_of_the_commands_themselves(story_llama, tmp_path):
    arguments = ["--model", str(story_llama), "--new-tokens", "4", "--verbs", "check,train"]
    command = [sys.executable, str(BENCHMARKS / "first_look.py"), *arguments, "--json", str(tmp_path / "looks.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    looks = {look["what"]: look for look in json.loads((tmp_path / "looks.json").read_text())["looks"]}
    assert list(looks)[:4] == ["check --help", "train --help", "generate, cold", "generate, warm"]
    assert looks["check --help"]["programs"] == 0
    # The first time, a product is timed in both dtypes.
    assert 0 < looks["generate, warm"]["programs"] == looks["generate, cold"]["programs"] - 2
    assert looks["check --help"]["cpu_seconds"] < looks["generate, warm"]["cpu_seconds"]
    run, evaluation = looks["train, two steps, warm"], looks["first evaluation and samples, warm"]
    assert 0 < evaluation["seconds"] < run["seconds"]
    assert all(what in done.stdout for what in looks)
