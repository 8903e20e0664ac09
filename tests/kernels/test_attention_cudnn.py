"""The cuDNN backend: errors, lowering, and the code around cuDNN, which only a GPU can run.

benchmarks/numerics.py checks its results on a device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

import flacuna_jax.kernels.attention as attention_module
from flacuna_jax.config.model import LoraConfig
from flacuna_jax.errors import UserError
from flacuna_jax.kernels import attention_cudnn
from flacuna_jax.kernels.attention import SAVED_NAMES, attention
from flacuna_jax.kernels.attention_reference import attention_reference, visible_bqk
from flacuna_jax.kernels.packed_mask import PackedMask, make_packed_mask
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.model.sharding import MESH_AXES
from flacuna_jax.training.network import NetworkConfig
from tests.kernels import packings
from tests.tiny import SMALL

FORWARD, BACKWARD = "__cudnn$fmhaSoftmax(", "__cudnn$fmhaSoftmaxBackward("


def segments_of(lengths: list[int], length: int) -> jax.Array:
    return jnp.array([[1] * n + [0] * (length - n) for n in lengths], jnp.int32)


def inputs(dim: int = 64, dtype: Any = jnp.bfloat16) -> tuple[jax.Array, ...]:
    return packings.inputs(0, 2, 32, 4, 2, dim, dtype)[:3]


@contextmanager
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An H200 to lower for, with a cuDNN version that JAX accepts."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,) * 4, MESH_AXES, (AxisType.Auto,) * 4, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        yield


@pytest.mark.parametrize(
    ("given", "one_document", "message"),
    [
        ({}, False, "rows of one document each .* may be packed; use auto"),
        ({"dtype": jnp.float32}, True, "bfloat16 and float16, not float32"),
        ({"dim": 256}, True, "head_dim up to 128 in multiples of 8, not 256"),
        ({"dim": 20}, True, "head_dim up to 128 in multiples of 8, not 20"),
    ],
)
def test_unsupported_arguments_are_errors(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], one_document: bool, message: str
) -> None:
    mask = make_packed_mask(segments_of([32, 20], 32), one_document=one_document)
    with on_gpu(monkeypatch), pytest.raises(UserError, match=f"attention backend cudnn .*{message}"):
        attention(*inputs(**given), mask, backend="cudnn")


def test_soft_caps_and_windows_in_some_layers_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = make_packed_mask(segments_of([32, 20], 32), window=8, one_document=True)
    with on_gpu(monkeypatch), pytest.raises(UserError, match="cudnn has no soft cap of scores"):
        attention(*inputs(), mask, softcap=50.0, backend="cudnn")
    with on_gpu(monkeypatch), pytest.raises(UserError, match="windows differ"):
        attention(*inputs(), mask.without_promises(), backend="cudnn")


def test_other_devices_are_errors() -> None:
    mask = make_packed_mask(segments_of([32, 20], 32), one_document=True)
    with pytest.raises(UserError, match="attention backend cudnn runs on NVIDIA GPUs, not on cpu"):
        attention(*inputs(), mask, backend="cudnn")


def test_a_jax_without_cudnn_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> int:
        raise RuntimeError("cuDNN is not detected.")

    mask = make_packed_mask(segments_of([32, 20], 32), one_document=True)
    with on_gpu(monkeypatch):
        monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", absent)
        with pytest.raises(UserError, match=r"attention backend cudnn: cuDNN is not detected. It comes with jax\[cuda"):
            attention(*inputs(), mask, backend="cudnn")


def test_each_pass_is_one_cudnn_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also under remat, with the forward pass's results saved by name as for other backends."""
    q, _, _ = inputs()

    def loss(x: jax.Array, weights: jax.Array, mask: PackedMask) -> jax.Array:
        def layer(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
            h = x @ weight
            return x + attention(h, h[:, :, :2], h[:, :, 2:], mask, backend="cudnn"), None

        saving = jax.checkpoint_policies.save_only_these_names(*SAVED_NAMES)
        x, _ = jax.lax.scan(jax.checkpoint(layer, policy=saving, prevent_cse=False), x, weights)
        return jnp.sum(x.astype(jnp.float32))

    mask = make_packed_mask(segments_of([32, 20], 32), window=8, one_document=True)
    with on_gpu(monkeypatch):
        traced = jax.jit(jax.grad(loss, 1)).trace(q, jnp.ones((3, 64, 64), q.dtype), mask)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count(FORWARD) == 1
    assert text.count(BACKWARD) == 1


@pytest.mark.parametrize("one_document", [True, False])
def test_a_step_of_unpacked_rows_uses_it_and_packed_rows_are_an_error(
    monkeypatch: pytest.MonkeyPatch, one_document: bool
) -> None:
    spec = ModelSpec(replace(SMALL, head_dim=16), LoraConfig(), "bfloat16", "bfloat16")
    config = NetworkConfig(spec, "dots", "cudnn", one_document)
    row = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), row)
    batch["loss_mask"] = jax.ShapeDtypeStruct((2, 16), jnp.bool_)
    held = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in spec.held.items()}
    adapters = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in spec.lora_shapes.items()}

    def losses(params: Any, batch: Any) -> Any:
        return config.with_params(params).token_losses(batch)

    with on_gpu(monkeypatch):
        if one_document:
            assert "dot_product_attention_fwd" in str(jax.make_jaxpr(losses)(held | adapters, batch))
            return
        with pytest.raises(UserError, match="may be packed"):
            jax.make_jaxpr(losses)(held | adapters, batch)


def test_auto_logs_why_it_is_not_selected(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    attention_module._log_once.cache_clear()
    mask = make_packed_mask(segments_of([32, 20], 32), one_document=True)
    with caplog.at_level("INFO"), on_gpu(monkeypatch):
        jax.make_jaxpr(attention)(*inputs(), mask)
    (message,) = caplog.messages
    assert message.startswith("attention: backend pallas_gpu, because the mesh has gpu devices (NVIDIA H200); cudnn")


@pytest.mark.parametrize("window", [None, 4])
def test_row_lengths_and_rows_of_several_documents_are_detected(window: int | None) -> None:
    segments = jnp.array(
        [
            [1, 1, 1, 1, 1, 1, 1, 1],
            [1, 1, 1, 0, 0, 0, 0, 0],
            [0, 0, 0, 0, 0, 0, 0, 0],
            [1, 1, 2, 2, 2, 2, 2, 0],
            [0, 0, 1, 1, 1, 1, 1, 1],
        ]
    )
    length_b, is_one_document_b = attention_cudnn.row_lengths(make_packed_mask(segments, window))
    np.testing.assert_array_equal(length_b, [8, 3, 0, 7, 6])
    np.testing.assert_array_equal(is_one_document_b, [True, True, True, False, False])


def in_place_of_cudnn(mask: PackedMask, scale: float, length_b: jax.Array) -> Any:
    """Saves a natural logarithm per query, like cuDNN, and computes with the values that are passed back.

    Values beyond a row's length are arbitrary.
    """
    visible = visible_bqk(mask)[:, None]
    live_bt = jnp.arange(mask.start_bt.shape[1]) < length_b[:, None]

    def repeated(x: jax.Array, heads: int) -> jax.Array:
        return jnp.repeat(x, heads // x.shape[2], axis=2)

    def scores(q: jax.Array, k: jax.Array) -> jax.Array:
        return jnp.where(visible, scale * jnp.einsum("bqhd,bkhd->bhqk", q, repeated(k, q.shape[2])), -jnp.inf)

    @jax.custom_vjp
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return forward(q, k, v)[0]

    def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        score = scores(q, k)
        lse = jax.nn.logsumexp(score, axis=-1)
        o = jnp.einsum("bhqk,bkhd->bqhd", jnp.exp(score - lse[..., None]), repeated(v, q.shape[2]))
        o = jnp.where(live_bt[..., None, None], o, jnp.nan)
        return o, (q, k, v, jnp.where(live_bt[:, None], lse, jnp.nan), o)

    def backward(kept: Any, do: jax.Array) -> Any:
        q, k, v, lse, o = kept
        weight = jnp.where(visible, jnp.exp(scores(q, k) - lse[..., None]), 0.0)
        inner = (
            jnp.einsum("bqhd,bkhd->bhqk", do, repeated(v, q.shape[2])) - jnp.einsum("bqhd,bqhd->bhq", do, o)[..., None]
        )
        dscore = scale * weight * inner

        def grouped(x: jax.Array) -> jax.Array:
            return x.reshape(*x.shape[:2], k.shape[2], -1, x.shape[-1]).sum(3)

        dk = grouped(jnp.einsum("bhqk,bqhd->bkhd", dscore, q))
        dv = grouped(jnp.einsum("bhqk,bqhd->bkhd", weight, do))
        dq = jnp.einsum("bhqk,bkhd->bqhd", dscore, repeated(k, q.shape[2]))
        return tuple(jnp.where(live_bt[..., None, None], gradient, jnp.nan) for gradient in (dq, dk, dv))

    attend.defvjp(forward, backward)
    return attend


@pytest.mark.parametrize("window", [None, 5])
def test_results_around_cudnn_equal_the_definition(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    monkeypatch.setattr(attention_cudnn, "_attend", in_place_of_cudnn)
    monkeypatch.setattr(attention_cudnn, "check", lambda *_: None)
    q, k, v, do = packings.inputs(0, 3, 24, 4, 2, 16)
    mask = make_packed_mask(segments_of([24, 10, 0], 24), window, one_document=True)

    def results(attend: Any) -> Any:
        o, pull = jax.vjp(lambda *qkv: attend(*qkv, mask, scale=0.25), q, k, v)
        return (o, *pull(do))

    found = jax.jit(lambda: results(lambda *given, **options: attention(*given, **options, backend="cudnn")))()
    for name, ours, wanted in zip(packings.RESULTS, found, results(attention_reference), strict=True):
        assert packings.relative_error(ours, wanted) < packings.FLOAT32_ERROR, name
    assert not np.any(found[0][1, 10:])
    assert not np.any(found[1][2])


def test_a_broken_promise_gives_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_cudnn, "_attend", in_place_of_cudnn)
    q, k, v, _ = packings.inputs(0, 2, 8, 2, 2, 16)
    mask = make_packed_mask(jnp.array([[1, 1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0]]), one_document=True)
    o, _ = attention_cudnn.forward(q, k, v, mask, scale=1.0)
    assert np.isnan(o[0]).all()
    assert np.isfinite(o[1]).all()
