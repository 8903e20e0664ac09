"""Quantised bases: bit for bit like bitsandbytes if it is installed, and as parts of the network."""

import dataclasses
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.config.run import MeshConfig
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.load import load_base
from flacuna_jax.kernels.packed_mask import make_packed_mask
from flacuna_jax.model.parameters import ModelSpec, Params, init_params, quantize
from flacuna_jax.model.quantized import (
    DYNAMIC_VALUES,
    KERNELS,
    NF4_VALUES,
    Int8Kernel,
    NF4Kernel,
    QuantParam,
)
from flacuna_jax.model.remat import REMAT_POLICIES
from flacuna_jax.model.sharding import make_mesh, parameter_shardings
from flacuna_jax.training.network import NetworkConfig
from flacuna_jax.training.state import StateLayout
from flacuna_jax.training.step import StepConfig, loss_and_gradients
from tests.tiny import SMALL, in_steps, packed_batch, random_params, to_device

AXES = (None, None)
CONFIG = dataclasses.replace(SMALL, hidden_size=64, intermediate_size=128, head_dim=16)
LORA = LoraConfig(rank=4, dropout=0.0, targets="all-linear")
with_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def weights(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Outliers, a block of zeros and a row of very small numbers among normal ones."""
    kernel = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    kernel[1, :64] = 0
    kernel[2] *= 1e-4
    kernel[3, 5] = 40.0
    return kernel


@with_bitsandbytes
def test_tables_equal_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    np.testing.assert_array_equal(NF4_VALUES, functional.get_4bit_type("nf4", device="cpu").numpy())
    np.testing.assert_array_equal(DYNAMIC_VALUES, functional.create_dynamic_map(signed=True).numpy())


@with_bitsandbytes
@pytest.mark.parametrize("shape", [(96, 192), (256, 128)])
def test_nf4_quantises_as_bitsandbytes(shape: tuple[int, int]) -> None:
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    kernel = torch.from_numpy(weights(shape)).bfloat16()
    packed, state = functional.quantize_4bit(kernel, blocksize=64, compress_statistics=True, quant_type="nf4")
    ours = NF4Kernel(jnp.asarray(kernel.float().numpy()))

    np.testing.assert_array_equal(np.asarray(ours.codes[...]).reshape(-1, 1), packed.numpy())
    # Means of thousands of magnitudes, summed in another order: the last bits of the offset differ.
    np.testing.assert_allclose(ours.absmax_offset[...], state.offset.numpy(), rtol=1e-6)
    np.testing.assert_allclose(ours.absmax_scale[...], state.state2.absmax.numpy(), rtol=1e-5)
    # Ours are the nearest entries of the table; their CPU kernel chooses a neighbour in about 1.5 % of the cases.
    steps = np.asarray(ours.absmax[...], int).reshape(-1) - state.absmax.numpy()
    assert np.mean(steps == 0) > 0.97
    assert np.abs(steps).max() == 1


@with_bitsandbytes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_codes_of_bitsandbytes_dequantise_to_the_same_bits(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    kernel = torch.from_numpy(weights((256, 320))).to(getattr(torch, dtype))
    packed, state = functional.quantize_4bit(kernel, blocksize=64, compress_statistics=True, quant_type="nf4")
    ours = NF4Kernel(jnp.zeros(kernel.shape))
    ours.codes = QuantParam(jnp.asarray(packed.numpy()).reshape(256, 160))
    ours.absmax = QuantParam(jnp.asarray(state.absmax.numpy()).reshape(256, 5))
    ours.absmax_scale = QuantParam(jnp.asarray(state.state2.absmax.numpy()))
    ours.absmax_offset = QuantParam(jnp.asarray(state.offset.numpy()))
    theirs = functional.dequantize_4bit(packed, state)
    found = jax.jit(lambda: ours.dequantized(AXES, jnp.dtype(dtype)))()
    # A product and a sum may be one fused operation: the last bit of float32, seldom one of bfloat16.
    atol = 1e-6 if dtype == "float32" else 0
    np.testing.assert_allclose(np.asarray(found, np.float32), theirs.float().numpy(), atol=atol, rtol=3e-7)


@with_bitsandbytes
def test_int8_equals_that_of_bitsandbytes() -> None:
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    kernel = torch.from_numpy(weights((40, 128))).half()
    codes, absmax, _ = functional.int8_vectorwise_quant(kernel.clone())
    ours = Int8Kernel(jnp.asarray(kernel.float().numpy()))
    np.testing.assert_array_equal(ours.row_absmax[...], absmax.numpy())
    # They multiply in float16, which rounds some values near a half to the other side.
    difference = np.asarray(ours.codes[...], int) - codes.numpy()
    assert np.abs(difference).max() <= 1
    assert np.mean(difference == 0) > 0.9


@pytest.mark.parametrize(("kind", "worst"), [("nf4", 0.16), ("int8", 0.5 / 127)])
def test_dequantised_weights_are_close(kind: str, worst: float) -> None:
    """At most half the widest gap of the table, plus for nf4 the rounding of the magnitudes."""
    kernel = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)
    found = np.asarray(KERNELS[kind](jnp.asarray(kernel)).dequantized(AXES, jnp.float32))
    largest = np.abs(kernel.reshape(64, 2, 64) if kind == "nf4" else kernel[:, None, :]).max(-1, keepdims=True)
    relative = np.abs((found - kernel).reshape(*largest.shape[:2], -1)) / largest
    assert worst / 2 <= relative.max() <= worst * 1.05


def test_nf4_needs_whole_blocks() -> None:
    with pytest.raises(UserError, match="nf4 needs rows of a multiple of 64 weights, but a row has 48"):
        ModelSpec(SMALL, LORA, quantization="nf4").held  # noqa: B018


def spec_of(kind: str | None, **lora: object) -> ModelSpec:
    return ModelSpec(CONFIG, LORA.model_copy(update=lora), "float32", "float32", kind)


def held_params(spec: ModelSpec, base: Params, mesh: jax.sharding.Mesh) -> Params:
    return {part: leaf for name, value in base.items() for part, leaf in quantize(spec, mesh, name, value).items()}


def dequantised_params(spec: ModelSpec, held: Params) -> Params:
    """The dequantised base as plain float32 parameters."""
    found = {}
    for name in spec.base_shapes:
        parts = {part.removeprefix(f"{name}/"): leaf for part, leaf in held.items() if part.startswith(f"{name}/")}
        if not parts:
            found[name] = held[name]
            continue
        kernels = []
        for layer in range(CONFIG.num_layers):
            kernel = KERNELS[spec.quantization](jnp.zeros(spec.base_shapes[name][1:]))
            for part, leaf in parts.items():
                setattr(kernel, part, QuantParam(leaf[layer]))
            kernels.append(kernel.dequantized(AXES, jnp.float32))
        found[name] = jnp.stack(kernels)
    return found


BATCH = to_device(
    in_steps(packed_batch([list(range(3, 20)), list(range(30, 50)), [5, 7, 9]], [[0], [1], [2], []], 24), 4)
)


@pytest.mark.parametrize("mesh_config", [MeshConfig(), MeshConfig(fsdp=2, tensor=2)], ids=["one", "split"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_training_uses_the_dequantised_base(kind: str, mesh_config: MeshConfig) -> None:
    spec, plain, mesh = spec_of(kind), spec_of(None), make_mesh(mesh_config)
    base = jax.device_put(random_params(spec.base_shapes, 0.2), parameter_shardings(spec.base, mesh))
    adapters = random_params(spec.lora_shapes, 0.1)
    held = held_params(spec, base, mesh)
    assert {name: (leaf.shape, leaf.dtype) for name, leaf in held.items()} == {
        name: (leaf.shape, leaf.dtype) for name, leaf in spec.held.items()
    }
    with jax.set_mesh(mesh):
        run = jax.jit(loss_and_gradients, static_argnums=0)
        loss, _, gradients = run(StepConfig(NetworkConfig(spec)), adapters, held, BATCH, 0)
        expected, _, expected_gradients = run(
            StepConfig(NetworkConfig(plain)), adapters, dequantised_params(spec, held), BATCH, 0
        )
        original, _, _ = run(StepConfig(NetworkConfig(plain)), adapters, base, BATCH, 0)
    assert float(loss) == pytest.approx(float(expected), abs=1e-6)
    assert abs(float(loss) - float(original)) > 1e-4
    for name, gradient in gradients.items():
        # float32 sums in another order; the largest gradients are 1.
        np.testing.assert_allclose(gradient, expected_gradients[name], atol=2e-5, err_msg=name)


@pytest.mark.parametrize("remat", sorted(REMAT_POLICIES.keys() - {"offload"}))  # like dots, in another memory
def test_no_dequantised_weight_is_saved_for_the_backward_pass(remat: str) -> None:
    spec = spec_of("nf4", targets=("q_proj", "v_proj"))
    mesh = make_mesh(MeshConfig())
    base = init_params(spec, spec.held, 0, mesh)
    adapters = random_params(spec.lora_shapes, 0.1)
    batch = {name: leaf[0] for name, leaf in BATCH.items()}

    def hidden(adapters: Params) -> jax.Array:
        model = spec.merge({**base, **adapters})
        return model(batch["tokens"], batch["positions"], make_packed_mask(batch["segment_ids"]), remat=remat)

    _, backward = jax.vjp(hidden, adapters)
    kernels = {shape for name, shape in spec.base_shapes.items() if name.endswith("_proj/weight")}
    kept = [leaf.shape for leaf in jax.tree.leaves(backward) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert kept, "the vector-Jacobian product shows its residuals"
    assert not [shape for shape in kept if shape in kernels or shape[::-1] in kernels]
    assert not [shape for shape in kept if (shape[0], *shape[:0:-1]) in kernels]


def test_dora_magnitudes_are_those_of_the_quantised_base() -> None:
    spec = spec_of("nf4", use_dora=True, targets=("up_proj",))
    mesh = make_mesh(MeshConfig(fsdp=2))
    base = jax.device_put(random_params(spec.base_shapes, 0.2), parameter_shardings(spec.base, mesh))
    held = held_params(spec, base, mesh)
    adapters = StateLayout(spec, optax.identity(), mesh).fresh_adapters(0, held)
    norms = np.linalg.norm(dequantised_params(spec, held)["layers/up_proj/weight"], axis=-1)
    np.testing.assert_allclose(adapters["layers/up_proj/lora_magnitude"], norms, rtol=1e-5)


def test_checkpoints_are_quantised_while_they_are_read(tmp_path: Path) -> None:
    checkpoints = pytest.importorskip("tests.huggingface.checkpoints")
    checkpoints.write(CONFIG, tmp_path)
    spec, mesh = spec_of("nf4"), make_mesh(MeshConfig())
    shardings = parameter_shardings(spec.base, mesh)
    plain = load_base(str(tmp_path), CONFIG, shardings, "float32")
    held = load_base(
        str(tmp_path), CONFIG, shardings, "float32", keep=lambda name, leaf: quantize(spec, mesh, name, leaf)
    )
    assert held.keys() == spec.held.keys()
    expected = NF4Kernel(plain["layers/o_proj/weight"][1])
    np.testing.assert_array_equal(held["layers/o_proj/weight/codes"][1], expected.codes[...])
    bits = 8 * sum(leaf.nbytes for name, leaf in held.items() if "o_proj" in name) / plain["layers/o_proj/weight"].size
    assert bits == 4 + 8 / 64 + (32 + 32) / (64 * 64)  # one group and one offset for a kernel this small
