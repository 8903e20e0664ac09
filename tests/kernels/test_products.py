"""Products of activations with a matrix: what is rounded, and when, on a mesh of CPUs.

Where the operands are whole numbers, all sums are exact in float32, whatever their order. So a product that is rounded
once to bfloat16 is known bit for bit, from numpy.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flacuna_jax.config.run import MeshConfig
from flacuna_jax.kernels.products import rows_as_columns, times_matrices, times_matrix
from flacuna_jax.model.sharding import make_mesh

BF16 = jnp.bfloat16


@pytest.fixture(params=[1, 4])
def mesh(request):
    mesh = make_mesh(MeshConfig(fsdp=request.param), jax.devices()[: request.param])
    with jax.set_mesh(mesh):
        yield mesh


def whole_numbers(mesh=None):
    """x [b, t, i], a matrix [o, i] and a cotangent [b, t, o], rows and outputs split over the mesh, in bfloat16."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(-8, 9, shape).astype(BF16) for shape in [(4, 96, 64), (48, 64), (4, 96, 48)]]
    if mesh is None:
        return [jnp.asarray(array) for array in arrays]
    return [jax.device_put(array, NamedSharding(mesh, PartitionSpec("fsdp"))) for array in arrays]


def normal_numbers(dtype, tokens):
    rng = np.random.default_rng(1)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in [(tokens, 64), (48, 64), (tokens, 48)]]


def exact(x, matrix, cotangent):
    """The product and the gradients of both operands by numpy, in float32."""
    x, matrix, cotangent = (np.asarray(array).astype(np.float32) for array in (x, matrix, cotangent))
    of_matrix = np.einsum("bto,bti->oi", cotangent, x)
    return np.einsum("bti,oi->bto", x, matrix), np.einsum("bto,oi->bti", cotangent, matrix), of_matrix


def with_gradients(function, x, matrix, cotangent):
    y, pull = jax.vjp(function, x, matrix)
    return y, *pull(cotangent.astype(y.dtype))


def in_scan(x, matrix):
    """The first of two steps of a scan, as over stacked layers."""
    steps = (jnp.stack([x, x]), jnp.stack([matrix, matrix]))
    return jax.lax.scan(lambda carry, operands: (carry, times_matrix(*operands)), None, steps)[1][0]


FORMS = {
    "eager": times_matrix,
    "jit": jax.jit(times_matrix),
    "checkpoint": jax.checkpoint(times_matrix),
    "scan": in_scan,
}


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_products_and_gradients_are_float32_sums_rounded_once(mesh, form):
    operands = whole_numbers(mesh)
    for found, wanted in zip(with_gradients(FORMS[form], *operands), exact(*operands), strict=True):
        assert found.dtype == BF16
        assert np.any(wanted.astype(BF16) != wanted)
        np.testing.assert_array_equal(found, wanted.astype(BF16))


def test_float32_results_of_bfloat16_operands_are_not_rounded(mesh):
    operands = whole_numbers(mesh)
    y, *gradients = with_gradients(lambda x, matrix: times_matrix(x, matrix, jnp.float32), *operands)
    wanted, *wanted_gradients = exact(*operands)
    assert y.dtype == jnp.float32
    np.testing.assert_array_equal(y, wanted)
    for found, wanted in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_array_equal(found, wanted.astype(BF16))


@pytest.mark.parametrize("tokens", [65, 96])
def test_float32_operands_are_multiplied_as_by_the_operator(mesh, tokens):
    operands = normal_numbers(jnp.float32, tokens)
    wanted = with_gradients(jax.jit(lambda x, matrix: x @ matrix.T), *operands)
    for found, expected in zip(with_gradients(jax.jit(times_matrix), *operands), wanted, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", [jnp.float32, BF16])
@pytest.mark.parametrize("tokens", [2, 10, 16, 18, 64])
@pytest.mark.parametrize("form", FORMS)
def test_products_of_a_few_tokens(mesh, form, tokens, dtype):
    """Gradients as well: training has so few tokens only in tests."""
    operands = [array.astype(dtype) for array in whole_numbers()]
    operands[0], operands[2] = (array[:2, : tokens // 2] for array in (operands[0], operands[2]))
    for found, wanted in zip(with_gradients(FORMS[form], *operands), exact(*operands), strict=True):
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, wanted.astype(dtype))


def test_the_matrix_of_a_few_tokens_is_the_first_operand(mesh):
    """XLA keeps the order, so it does not copy the matrix in every call."""
    x, matrix, _ = normal_numbers(jnp.float32, 16)
    compiled = jax.jit(times_matrix).lower(x, matrix).compile().as_text()
    assert re.search(r"f32\[48,16\]\S* (dot|fusion)\(", compiled), compiled


@pytest.mark.parametrize(("tokens", "computed"), [(4, 4), (5, 8), (8, 8), (12, 16), (64, 64)])
def test_a_few_tokens_are_padded_to_whole_lanes(mesh, tokens, computed):
    x, matrix, _ = normal_numbers(jnp.float32, tokens)
    compiled = jax.jit(times_matrix).lower(x, matrix).compile().as_text()
    assert re.search(rf"f32\[48,{computed}\]\S* (dot|fusion)\(", compiled), compiled


@pytest.mark.parametrize("dtype", [jnp.float32, BF16])
@pytest.mark.parametrize("tokens", [1, 3, 17, 96])
@pytest.mark.parametrize("shared", [False, True])
def test_products_with_several_matrices_are_exact_sums_in_float32(mesh, tokens, dtype, shared):
    """Queries times keys; `shared` keys have no axis of rows."""
    rng = np.random.default_rng(2)
    x = rng.integers(-8, 9, (2, 3, tokens, 64)).astype(np.float32)
    matrices = rng.integers(-8, 9, (3, 40, 64) if shared else (2, 3, 40, 64)).astype(np.float32)
    found = jax.jit(times_matrices)(jnp.asarray(x, dtype), jnp.asarray(matrices, dtype))
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, x @ matrices.swapaxes(-1, -2))


def test_one_token_in_bfloat16_has_the_numbers_of_a_row_of_two(mesh):
    x, matrix, _ = normal_numbers(BF16, 2)
    alone = times_matrix(x[:1], matrix)
    assert alone.shape == (1, 48)
    assert alone.dtype == BF16
    np.testing.assert_array_equal(alone, times_matrix(x, matrix)[:1])


@pytest.mark.parametrize("shape", [(5, 7), (3, 5, 7)])
def test_rows_as_columns_is_the_transpose(mesh, shape):
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    for function in (rows_as_columns, jax.jit(rows_as_columns)):
        np.testing.assert_array_equal(function(jnp.asarray(x)), x.swapaxes(-1, -2))


def test_without_a_mesh_it_is_the_plain_einsum():
    x, matrix, _ = whole_numbers()
    plain = jax.make_jaxpr(lambda x, matrix: jnp.einsum("...i,oi->...o", x, matrix))(x, matrix)
    assert str(jax.make_jaxpr(times_matrix)(x, matrix)) == str(plain)
