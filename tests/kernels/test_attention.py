"""The entry point: errors, choice of backend, what remat saves, sharding on a mesh."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads

import flacuna_jax.kernels.attention as attention_module
from flacuna_jax.kernels.attention import SAVED_NAMES, attention
from flacuna_jax.kernels.attention_reference import attention_reference
from flacuna_jax.kernels.packed_mask import PackedMask, make_packed_mask
from flacuna_jax.kernels.tiles import GpuTile, GpuTiles
from tests.kernels import packings

TILE = GpuTile(32, 16, 4, 1)
BACKENDS = {
    "xla": {},
    "pallas_gpu": {"interpret": True, "tiles": GpuTiles(TILE, TILE, TILE)},
    "pallas_tpu": {"interpret": True},
}
"""Backend → arguments to run it on a CPU."""
FAST = {"xla_backend_optimization_level": 0}
"""Compiler options for tests of the program's structure only."""


def attend_on_cpu(backend: str) -> Callable[..., jax.Array]:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: PackedMask, **options: Any) -> jax.Array:
        return attention(q, k, v, mask, backend=backend, **BACKENDS[backend], **options)  # type: ignore[arg-type]

    return attend


def example(rows: int = 4, length: int = 64) -> tuple[tuple[jax.Array, ...], PackedMask]:
    segments = packings.random_segments(np.random.default_rng(0), rows, length)
    return packings.inputs(0, rows, length, 4, 2, 16), make_packed_mask(jnp.array(segments))


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_differentiate_like_the_definition(backend: str, softcap: float | None) -> None:
    (q, k, v, do), mask = example()
    if softcap is not None:  # as in a layer of a network whose windows differ
        mask = mask.within(13).without_promises()

    def through(attend: Callable[..., jax.Array]) -> Any:
        def loss(*qkv: jax.Array) -> jax.Array:
            return jnp.vdot(attend(*qkv, mask, scale=0.3, softcap=softcap), do)

        return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

    for actual, expected in zip(through(attend_on_cpu(backend)), through(attention_reference), strict=True):
        assert packings.relative_error(actual, expected) < packings.FLOAT32_ERROR


def test_gradients_equal_finite_differences() -> None:
    (q, k, v, _), mask = example(rows=1, length=12)
    # Steps of 1e-2 on float32 values: the difference quotient itself is good to about 1e-3.
    check_grads(
        jax.jit(lambda *qkv: attention(*qkv, mask)), (q, k, v), order=1, modes=["rev"], atol=1e-2, rtol=1e-2, eps=1e-2
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": jnp.zeros((4, 64, 3, 16))}, "multiple of Hkv"),
        ({"v": jnp.zeros((4, 64, 2, 8))}, "multiple of Hkv"),
        ({"q": jnp.zeros((4, 64, 4, 16), jnp.bfloat16)}, "share a dtype"),
        ({"mask": make_packed_mask(jnp.ones((4, 32), jnp.int32))}, "the mask is for rows"),
        ({"scale": 0.0}, "above 0"),
        ({"softcap": -1.0}, "softcap is -1.0, but must be above 0"),
        ({"backend": "flash"}, "choose one of auto, xla, pallas_gpu, pallas_tpu, cudnn, tokamax"),
        ({"tiles": GpuTiles(TILE, TILE, TILE)}, "GpuTiles given with backend auto"),
    ],
)
def test_inconsistent_arguments_are_errors(changes: dict[str, Any], message: str) -> None:
    (q, k, v, _), mask = example()
    given = {"q": q, "k": k, "v": v, "mask": mask} | changes
    with pytest.raises(ValueError, match=message):
        attention(given.pop("q"), given.pop("k"), given.pop("v"), given.pop("mask"), **given)


def step(remat: Any, attend: Callable[..., jax.Array]) -> Callable[..., Any]:
    """A loss over two scanned layers and its gradient, as a training step would have it."""

    def loss(x: jax.Array, weights: jax.Array, mask: PackedMask) -> jax.Array:
        def layer(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
            h = jnp.tanh(x @ weight)
            return x + attend(h, h[:, :, :2], h[:, :, 2:], mask), None

        return jnp.sum(jax.lax.scan(remat(layer), x, weights)[0] ** 2)

    return jax.jit(jax.grad(loss, 1))


@pytest.mark.parametrize("backend", ["xla", "pallas_gpu", pytest.param("pallas_tpu", marks=pytest.mark.slow)])
def test_with_its_names_saved_the_forward_pass_runs_once(backend: str) -> None:
    (x, *_), mask = example()
    weights = jnp.ones((2, 16, 16))

    def exponentials(remat: Callable[..., Any]) -> int:
        """How often the compiled step computes softmax weights, which every pass over the scores does once."""
        text = step(remat, attend_on_cpu(backend)).lower(x, weights, mask).compile(FAST).as_text()
        return text.count(" exponential(")

    def saving(policy: Any) -> Callable[..., Any]:
        return lambda layer: jax.checkpoint(layer, policy=policy, prevent_cse=False)

    once = exponentials(lambda layer: layer)
    named = exponentials(saving(jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)))
    twice = exponentials(saving(jax.checkpoint_policies.nothing_saveable))
    assert once == named < twice


@pytest.mark.parametrize(
    ("backend", "shape"),
    [
        ("auto", (2, 2, 1)),
        ("pallas_gpu", (1, 2, 2)),
        pytest.param("pallas_tpu", (2, 1, 2), marks=pytest.mark.slow),
    ],
)
def test_on_a_mesh_each_device_computes_its_rows_and_heads(backend: str, shape: tuple[int, int, int]) -> None:
    (q, k, v, do), mask = example()
    attend = attention if backend == "auto" else attend_on_cpu(backend)

    def results(q: jax.Array, k: jax.Array, v: jax.Array, mask: PackedMask) -> Any:
        return jax.value_and_grad(lambda *qkv: jnp.sum(attend(*qkv, mask) * do), (0, 1, 2))(q, k, v)

    _, expected = jax.jit(results)(q, k, v, mask)
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    layout = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor", None))
    with jax.set_mesh(mesh):
        compiled = jax.jit(results).lower(*jax.device_put((q, k, v), layout), mask).compile(FAST)
        _, actual = compiled(*jax.device_put((q, k, v), layout), mask)
    for name, one, many in zip(packings.RESULTS[1:], expected, actual, strict=True):
        assert many.sharding.is_equivalent_to(layout, 4), name
        assert packings.relative_error(many, one) < packings.FLOAT32_ERROR, name
    assert "all-gather" not in compiled.as_text()


def test_dimensions_that_a_mesh_does_not_divide_are_computed_whole() -> None:
    (q, k, v, _), mask = example(rows=3)
    expected = jax.jit(attention)(q, k, v, mask)
    with jax.set_mesh(jax.make_mesh((1, 1, 4), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)):
        actual = jax.jit(attention)(q, k, v, mask)  # 2 key heads over 4 devices
    with jax.set_mesh(jax.make_mesh((1, 4, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)):
        other = jax.jit(attention)(q, k, v, mask)  # 3 rows over 4 devices
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    np.testing.assert_allclose(other, expected, atol=1e-6)


def lowered_gradient(platform: str) -> str:
    q, k, v, _ = packings.inputs(0, 2, 256, 2, 2, 128, jnp.bfloat16)
    mask = make_packed_mask(jnp.ones((2, 256), jnp.int32))

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, mask).astype(jnp.float32).sum()

    return jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, v).lower(lowering_platforms=(platform,)).as_text()


GPU_KERNEL, TPU_KERNEL = "triton", "tpu_custom_call"


def test_auto_depends_on_the_platform_at_lowering() -> None:
    assert "stablehlo.dot_general" in lowered_gradient("cpu")
    assert TPU_KERNEL in lowered_gradient("tpu")
    assert TPU_KERNEL not in lowered_gradient("cpu")
    assert GPU_KERNEL not in lowered_gradient("cpu")


def test_a_head_too_large_for_gpus_uses_another_backend() -> None:
    q, k, v, _ = packings.inputs(0, 1, 16, 2, 2, 320)
    mask = make_packed_mask(jnp.ones((1, 16), jnp.int32))
    assert jax.jit(attention)(q, k, v, mask).shape == q.shape
    with pytest.raises(ValueError, match="head_dim 320 in float32"):
        attention(q, k, v, mask, backend="pallas_gpu")


def test_auto_selects_the_kernels_of_an_absent_gpu() -> None:
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        text = lowered_gradient("cuda")
    assert GPU_KERNEL in text
    assert "stablehlo.dot_general" not in text


def test_auto_on_a_mesh_selects_the_backend_of_its_devices(caplog: pytest.LogCaptureFixture) -> None:
    (q, k, v, _), mask = example()
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",), axis_types=(AxisType.Auto,))
    attention_module._log_once.cache_clear()
    with caplog.at_level("INFO"), jax.set_mesh(mesh):
        jaxpr = jax.make_jaxpr(attention)(q, k, v, mask)
        jax.make_jaxpr(attention)(q, k, v, mask)
    assert "pallas_call" not in str(jaxpr)
    assert [message for message in caplog.messages if "backend" in message] == [
        "attention: backend xla, because the mesh has cpu devices (cpu)"
    ]


@pytest.mark.parametrize(("capability", "backend"), [("7.5", "xla"), ("8.6", "pallas_gpu")])
def test_gpus_without_bfloat16_tensor_cores_have_no_kernels(monkeypatch, caplog, capability: str, backend: str) -> None:
    kind = "NVIDIA GeForce RTX 2080 Ti"
    present = SimpleNamespace(device_kind=kind, compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [present])
    attention_module._log_once.cache_clear()
    with caplog.at_level("INFO"):
        assert attention_module._resolve("auto", "gpu", kind, 64, jnp.bfloat16, False) == backend
    assert ("of compute capability 7.5, and the kernels need 8.0" in caplog.messages[-1]) == (backend == "xla")


WITHOUT_TRITON = """
import sys
sys.modules["jax.experimental.pallas.triton"] = None
import logging
import jax, jax.numpy as jnp
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from flacuna_jax.kernels.attention import attention
from flacuna_jax.kernels.packed_mask import make_packed_mask

logging.basicConfig(level="INFO", stream=sys.stdout)
q, mask = jnp.ones((1, 16, 2, 16)), make_packed_mask(jnp.ones((1, 16), jnp.int32))
print(jax.jit(jax.grad(lambda q: attention(q, q, q, mask).sum()))(q).shape)
try:
    attention(q, q, q, mask, backend="pallas_gpu")
except ValueError as error:
    print(error)
for kind, platform in (("NVIDIA H200", "gpu"), ("TPU v5", "tpu")):
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=device)):
        jax.make_jaxpr(attention)(q, q, q, mask)
"""


def test_everything_else_works_without_pallas_triton() -> None:
    """JAX has announced its removal; only one module depends on it."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [line.removeprefix("INFO:flacuna_jax.kernels.attention:") for line in done.stdout.splitlines()]
    because = "because the mesh has"
    assert [line for line in said if "no ambient mesh" not in line] == [
        "(1, 16, 2, 16)",
        "backend pallas_gpu is not available: the installed jax has no Triton lowering of Pallas; use auto",
        f"attention: backend xla, {because} gpu devices (NVIDIA H200) and this package has no kernels for them: "
        "the installed jax has no Triton lowering of Pallas; tokamax supports bfloat16 and float16, not float32",
        f"attention: backend pallas_tpu, {because} tpu devices (TPU v5)",
    ]


def test_one_module_needs_each_lowering_of_pallas() -> None:
    kernels = Path(attention_module.__file__).parent
    importing = {
        lowering: sorted(path.name for path in kernels.glob("*.py") if f"pallas import {lowering} " in path.read_text())
        for lowering in ("triton", "tpu", "mosaic_gpu")
    }
    assert importing == {"triton": ["attention_gpu.py"], "tpu": ["attention_tpu.py"], "mosaic_gpu": []}
