"""The tokamax backend: errors, selection by `auto`, the code around its kernels, and the kernels themselves.

The kernels run in Mosaic GPU's interpreter (`python -m tests.kernels.tokamax_interpreted`) and through the compilers
for sm_90a and sm_100a. Those tests need tokamax, jax 0.12 and a CUDA plugin, and skip elsewhere. Their speed, and
the asynchronous parts of the hardware, are tested by benchmarks/numerics.py and benchmarks/attention.py on a device.
"""

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

import flacuna_jax.kernels.attention as attention_module
from flacuna_jax.errors import UserError
from flacuna_jax.kernels import attention_tokamax
from flacuna_jax.kernels.attention import SAVED_NAMES, attention
from flacuna_jax.kernels.packed_mask import PackedMask, make_packed_mask
from flacuna_jax.planning.targets import (
    TARGETS,
    CompilerMissing,
    Target,
    absent_devices,
    gpu_target_config,
    parse_target,
)
from tests.kernels import packings
from tests.kernels.remat import kernels_in_gradient

H200, B200 = "NVIDIA H200", "NVIDIA B200"
VERSION = attention_tokamax.VERSION
needs_tokamax = pytest.mark.skipif(
    attention_tokamax.installed() != VERSION, reason=f"tokamax {VERSION} is not installed (Python 3.12)"
)


@contextmanager
def on(kind: str) -> Iterator[None]:
    device = AbstractDevice(device_kind=kind, num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=device)):
        yield


def inputs(dim: int = 64, dtype: Any = jnp.bfloat16) -> tuple[tuple[jax.Array, ...], PackedMask]:
    segments = packings.random_segments(np.random.default_rng(0), 2, 32)
    return packings.inputs(0, 2, 32, 4, 2, dim, dtype)[:3], make_packed_mask(jnp.array(segments))


def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    module = attention_module._module
    monkeypatch.setattr(attention_module, "_module", lambda name: None if name == "pallas_gpu" else module(name))


@pytest.fixture
def tokamax_is_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_tokamax, "installed", lambda: VERSION)


@pytest.mark.parametrize(
    ("kind", "given", "version", "message"),
    [
        (
            "NVIDIA RTX A6000",
            {},
            VERSION,
            r"has kernels for Hopper .* not for NVIDIA RTX A6000",
        ),
        ("NVIDIA RTX PRO 6000 Blackwell", {}, VERSION, ".* not for NVIDIA RTX PRO 6000 Blackwell"),
        (H200, {"dtype": jnp.float32}, VERSION, "supports bfloat16 and float16, not float32"),
        (H200, {"dim": 256}, VERSION, "supports head_dim up to 128, not 256"),
        (H200, {}, None, r"needs tokamax .* not installed: pip install 'flacuna-jax\[tokamax\]' \(Python 3.12\)"),
        (H200, {}, "0.0.12", "needs tokamax 0.0.17, but 0.0.12 is installed: pip install 'tokamax==0.0.17'"),
    ],
)
def test_unsupported_arguments_are_errors(
    monkeypatch: pytest.MonkeyPatch, kind: str, given: dict[str, Any], version: str | None, message: str
) -> None:
    monkeypatch.setattr(attention_tokamax, "installed", lambda: version)
    qkv, mask = inputs(**given)
    with on(kind), pytest.raises(UserError, match=f"attention backend tokamax {message}"):
        attention(*qkv, mask, backend="tokamax")


def test_other_devices_are_errors(tokamax_is_here: None) -> None:
    qkv, mask = inputs()
    with pytest.raises(UserError, match="attention backend tokamax runs on NVIDIA GPUs, not on cpu; or use auto"):
        attention(*qkv, mask, backend="tokamax")


SLOWER, FASTER = {"pallas_gpu": 0.001, "tokamax": 0.002}, {"pallas_gpu": 0.002, "tokamax": 0.001}


@pytest.mark.parametrize(
    ("version", "has_triton", "measured", "kind", "backend", "why"),
    [
        (VERSION, True, {}, H200, "pallas_gpu", ""),
        (VERSION, True, SLOWER, H200, "pallas_gpu", ""),
        (VERSION, True, FASTER, H200, "tokamax", r", .*the fastest \(pallas_gpu 2 ms, tokamax 1 ms\)"),
        (None, True, FASTER, H200, "pallas_gpu", "; tokamax is measured to be faster .*, but needs tokamax 0.0.17"),
        (
            VERSION,
            False,
            {},
            B200,
            "tokamax",
            " and this package has no kernels for them: the installed jax has no Triton",
        ),
        (None, False, {}, H200, "xla", " and this package has no kernels .*; tokamax needs tokamax 0.0.17"),
        (
            VERSION,
            False,
            {},
            "NVIDIA RTX A6000",
            "xla",
            ".*; tokamax has kernels for Hopper .* not for NVIDIA RTX A6000",
        ),
    ],
)
def test_auto_selects_it_without_triton_or_if_it_is_measured_to_be_faster(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    version: str | None,
    has_triton: bool,
    measured: dict[str, float],
    kind: str,
    backend: str,
    why: str,
) -> None:
    monkeypatch.setattr(attention_tokamax, "installed", lambda: version)
    monkeypatch.setattr(attention_module, "measured_seconds", lambda *_: measured)
    if not has_triton:
        without_triton(monkeypatch)
    attention_module._log_once.cache_clear()
    with caplog.at_level("INFO"):
        chosen = attention_module._resolve("auto", "gpu", kind, 64, jnp.bfloat16, False)
    assert chosen == backend
    expected = rf"attention: backend {backend}, because the mesh has gpu devices \({kind}\){why}"
    assert re.match(expected + (".*" if why else "$"), caplog.messages[-1]), caplog.messages


def test_a_step_without_a_mesh_uses_it_too(monkeypatch: pytest.MonkeyPatch, tokamax_is_here: None) -> None:
    without_triton(monkeypatch)
    assert attention_module._gpu_backend(H200, 128, jnp.bfloat16)[0] == "tokamax"
    assert attention_module._gpu_backend(H200, 128, jnp.float32)[0] == "xla"
    capped, why = attention_module._gpu_backend(H200, 128, jnp.bfloat16, softcap=50.0)
    assert capped == "xla"
    assert "tokamax is not tested here with a soft cap" in why


def in_place_of_tokamax(length: int) -> attention_tokamax._Kernels:
    """tokamax's two functions for one row, by the definition. Like the kernels, they do not accept a query without
    visible keys or a row of incomplete tiles."""

    def scores_hqk(q_thd: jax.Array, k_thd: jax.Array, k_start: jax.Array, scale: float) -> jax.Array:
        assert q_thd.shape[0] == -(-length // attention_tokamax.TILE) * attention_tokamax.TILE
        k_thd = jnp.repeat(k_thd, q_thd.shape[1] // k_thd.shape[1], axis=1)
        position_t = jnp.arange(q_thd.shape[0])
        visible = (k_start[0][:, None] <= position_t) & (position_t <= position_t[:, None])
        return jnp.where(visible, scale * jnp.einsum("qhd,khd->hqk", q_thd, k_thd), -jnp.inf)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array, *, k_start: Any, logits_scale: float, **_: Any) -> Any:
        s_hqk = scores_hqk(q, k, k_start, logits_scale)
        top_hq = jnp.max(s_hqk, axis=-1)
        weight_hqk = jnp.exp(s_hqk - top_hq[..., None])
        sum_hq = weight_hqk.sum(axis=-1)
        v = jnp.repeat(v, q.shape[1] // v.shape[1], axis=1)
        return jnp.einsum("hqk,khd->qhd", weight_hqk / sum_hq[..., None], v), (top_hq, sum_hq)

    def backward(
        q: jax.Array, k: jax.Array, v: jax.Array, residuals: Any, o: jax.Array, do: jax.Array, **options: Any
    ) -> Any:
        top_hq, sum_hq = residuals
        scale = options["logits_scale"]
        group = q.shape[1] // k.shape[1]
        weight_hqk = jnp.exp(scores_hqk(q, k, options["k_start"], scale) - top_hq[..., None]) / sum_hq[..., None]
        dweight_hqk = jnp.einsum("qhd,khd->hqk", do, jnp.repeat(v, group, axis=1))
        delta_hq = jnp.einsum("qhd,qhd->hq", o, do)
        dscore_hqk = scale * weight_hqk * (dweight_hqk - delta_hq[..., None])
        dq = jnp.einsum("hqk,khd->qhd", dscore_hqk, jnp.repeat(k, group, axis=1))
        by_group = (k.shape[0], k.shape[1], group, -1)
        dk = jnp.einsum("hqk,qhd->khd", dscore_hqk, q).reshape(by_group).sum(axis=2)
        dv = jnp.einsum("hqk,qhd->khd", weight_hqk, do).reshape(by_group).sum(axis=2)
        return dq, dk, dv, None

    return attention_tokamax._Kernels(forward, None, backward, None)


@pytest.mark.parametrize("window", [None, 13])
@pytest.mark.parametrize("length", [1, 90, 128, 200])
def test_results_around_the_kernels_equal_the_definition(
    monkeypatch: pytest.MonkeyPatch, length: int, window: int | None
) -> None:
    monkeypatch.setattr(attention_tokamax, "_kernels", lambda _: in_place_of_tokamax(length))
    results = packings.results_of(
        attention_tokamax.forward, attention_tokamax.backward, scale=16**-0.5, device_kind=H200
    )
    for seed in range(2):
        segments = packings.random_segments(np.random.default_rng(seed), 8, length)
        mask = make_packed_mask(jnp.array(segments), window)
        arrays = packings.inputs(seed, 8, length, 4, 2, 16)
        packings.assert_float32_exact(results, arrays, mask)
        padding_is_large = tuple(jnp.where((segments == 0)[..., None, None], 1e6 * x, x) for x in arrays)
        packings.assert_padding_is_zero(results, padding_is_large, segments, mask)


def test_lse_equals_that_of_other_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_tokamax, "_kernels", lambda _: in_place_of_tokamax(90))
    segments = packings.random_segments(np.random.default_rng(3), 8, 90)
    mask = make_packed_mask(jnp.array(segments))
    q, k, v, _ = packings.inputs(0, 8, 90, 4, 2, 16)
    _, found = attention_tokamax.forward(q, k, v, mask, scale=0.3, device_kind=H200)
    _, wanted = attention_module._module("xla").forward(q, k, v, mask, scale=0.3)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.slow
@needs_tokamax
@pytest.mark.parametrize("kind", [H200, B200])
def test_the_kernels_agree_with_the_definition(kind: str) -> None:
    """In a separate process: every thread of the interpreted kernel occupies a thread of XLA's pool, which has one
    thread per device."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=16", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.kernels.tokamax_interpreted", kind]
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    print(done.stdout)


def mesh_of(kind: str, shape: tuple[int, int, int] = (1, 1, 1)) -> Mesh:
    count = int(np.prod(shape))
    try:
        if kind == H200:
            devices = absent_devices(parse_target(f"{count}xh200"))
        else:
            absent_devices(parse_target("h200"))  # skips without a compiler
            described, name = gpu_target_config(b200()), f"1x1x{count}"
            devices = topologies.get_topology_desc(
                name, platform="cuda", topology=name, target_config=described
            ).devices
    except CompilerMissing as missing:
        pytest.skip(str(missing))
    return Mesh(np.array(devices).reshape(shape), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def b200() -> Target:
    """Only the facts for the compiler: capability and multiprocessors; the shared memory of a block is that of
    Hopper."""
    h200 = TARGETS["h200"]
    assert h200.gpu is not None
    gpu = dataclasses.replace(h200.gpu, compute_capability=(10, 0), cores=148)
    return dataclasses.replace(h200, device_kind=B200, gpu=gpu)


def compiled_gradient(
    mesh: Mesh, heads: int = 40, kv_heads: int = 40, dim: int = 128, length: int = 1280, window: int | None = None
) -> str:
    def shaped(shape: tuple[int, ...], dtype: Any, *axes: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

    rows = ("data", "fsdp")
    q, k = (shaped((4, length, h, dim), jnp.bfloat16, rows, None, "tensor", None) for h in (heads, kv_heads))
    interval = shaped((4, length), jnp.int32, rows, None)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, mask: PackedMask) -> jax.Array:
        return jnp.sum(attention(q, k, v, mask, backend="tokamax").astype(jnp.float32) ** 2)

    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, PackedMask(interval, interval, window))
        return lowered.compile().as_text() or ""


MOSAIC_CALL = 'custom_call_target="mosaic_gpu_v2"'
CASES = [{}, {"dim": 64}, {"dim": 96}, {"dim": 80, "length": 1000}, {"heads": 32, "kv_heads": 8, "window": 256}]


COMPILE = """
from tests.kernels.test_attention_tokamax import MOSAIC_CALL, compiled_gradient, mesh_of
print(compiled_gradient(mesh_of({kind!r}), **{case!r}).count(MOSAIC_CALL))
"""


@pytest.mark.slow
@needs_tokamax
@pytest.mark.parametrize(("kind", "architecture"), [(H200, "sm_90a"), (B200, "sm_100a")])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernels_compile_without_a_gpu(kind: str, architecture: str, case: dict[str, Any], tmp_path: Path) -> None:
    """Compiles to machine code, because Mosaic runs ptxas during XLA's compilation. In a separate process, because
    Mosaic compiles only for the first architecture in a process."""
    mesh_of(kind)  # skips without a compiler
    dumping = {"MOSAIC_GPU_DUMP_TO": str(tmp_path), "MOSAIC_GPU_DUMP_PTX": "1"}
    command = [sys.executable, "-c", COMPILE.format(kind=kind, case=case)]
    done = subprocess.run(command, env=os.environ | dumping, capture_output=True, text=True)
    assert done.stdout == "3\n", done.stderr
    kernels = [path.read_text() for path in tmp_path.glob("*.ptx")]
    assert len(kernels) == 3
    assert all(f".target {architecture}" in text for text in kernels)


@pytest.mark.slow
@needs_tokamax
@pytest.mark.parametrize("shape", [(1, 4, 1), (1, 2, 2)])
def test_each_device_computes_its_own_part(shape: tuple[int, int, int]) -> None:
    text = compiled_gradient(mesh_of(H200, shape))
    assert text.count(MOSAIC_CALL) == 3
    assert not re.search(
        r" (all-gather|all-reduce|all-to-all|collective-permute)(-start)?\(", text.replace("f32[]", "")
    )


@pytest.mark.slow
@needs_tokamax
def test_under_remat_the_forward_kernel_runs_once() -> None:
    mesh = mesh_of(H200)

    def kernels(policy: Any) -> int:
        return kernels_in_gradient(mesh, jax.set_mesh(mesh), MOSAIC_CALL, policy, "tokamax")

    assert kernels(jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)) == 3
    assert kernels(jax.checkpoint_policies.nothing_saveable) == 4
