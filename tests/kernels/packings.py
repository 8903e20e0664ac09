"""Random packed rows, and the comparison for all backends."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flacuna_jax.kernels.attention_reference import attention_reference
from flacuna_jax.kernels.packed_mask import PackedMask

RESULTS = ("o", "dq", "dk", "dv")


def random_segments(rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
    """int32 [rows, length]: from one document to a document per token, padding at the end or (rarely) anywhere."""
    segments = np.zeros((rows, length), np.int32)
    for row in range(rows):
        mean = max(1, rng.choice([1, 3, 10, length / 4, length]))
        used = rng.choice([length, length, rng.integers(0, length + 1)])
        position, document = 0, 0
        while position < used:
            stop = min(used, position + rng.geometric(1 / mean))
            is_hole = rng.random() < 0.05
            document += 1
            segments[row, position:stop] = 0 if is_hole else document
            position = stop
    return segments


def inputs(
    seed: int, rows: int, length: int, heads: int, kv_heads: int, dim: int, dtype: Any = jnp.float32
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """q, k, v and the gradient of o."""
    keys = jax.random.split(jax.random.key(seed), 4)
    shapes = [(rows, length, h, dim) for h in (heads, kv_heads, kv_heads, heads)]
    q, k, v, do = (jax.random.normal(key, shape).astype(dtype) for key, shape in zip(keys, shapes, strict=True))
    return q, k, v, do


def results_of(forward: Callable[..., Any], backward: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """(q, k, v, do, mask) -> (o, dq, dk, dv) of a backend."""

    @jax.jit
    def results(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, mask: PackedMask) -> tuple[jax.Array, ...]:
        o, lse = forward(q, k, v, mask, **options)
        return o, *backward(q, k, v, mask, o, lse, do, **options)

    return results


@jax.jit
def oracle(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, mask: PackedMask) -> tuple[jax.Array, ...]:
    """The same by autodiff of the definition, in the inputs' dtype."""
    o, pullback = jax.vjp(lambda q, k, v: attention_reference(q, k, v, mask, scale=q.shape[-1] ** -0.5), q, k, v)
    return o, *pullback(do)


def oracle_in_float32(
    q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, mask: PackedMask
) -> tuple[jax.Array, ...]:
    return oracle(*(x.astype(jnp.float32) for x in (q, k, v, do)), mask)


def relative_error(actual: jax.Array, expected: jax.Array) -> float:
    """‖actual − expected‖ / ‖expected‖; if the expected entries are almost zero, the error per entry itself.

    Inputs are of size 1. Gradients that cancel, such as dq of a document of one token, are only rounding errors.
    """
    difference = np.linalg.norm(np.asarray(actual, np.float64) - np.asarray(expected, np.float64))
    size, per_entry = np.linalg.norm(np.asarray(expected, np.float64)), np.sqrt(expected.size)
    return float(difference / (size if size > 0.01 * per_entry else per_entry))


# Maximum relative L2 errors of the kernels. float32: a few roundings of exp2 and of sums over T. bfloat16: weights
# are rounded to 8 bits before the second product, which alone costs 2e-3 to 3e-3, in XLA's own bfloat16 path as well.
FLOAT32_ERROR = 2e-6
BFLOAT16_ERROR = 5e-3


def assert_float32_exact(results: Callable[..., Any], arrays: tuple[jax.Array, ...], mask: PackedMask) -> None:
    for name, actual, expected in zip(RESULTS, results(*arrays, mask), oracle(*arrays, mask), strict=True):
        error = relative_error(actual, expected)
        assert error <= FLOAT32_ERROR, f"{name}: relative error {error:.1e}"


def assert_bfloat16_close(results: Callable[..., Any], arrays: tuple[jax.Array, ...], mask: PackedMask) -> None:
    exact, plain = oracle_in_float32(*arrays, mask), oracle(*arrays, mask)
    for name, actual, expected, xla in zip(RESULTS, results(*arrays, mask), exact, plain, strict=True):
        error, own = relative_error(actual, expected), relative_error(xla, expected)
        assert actual.dtype == jnp.bfloat16
        assert error <= min(BFLOAT16_ERROR, 2 * own), f"{name}: relative error {error:.1e}, XLA's own {own:.1e}"


def assert_isolated(
    results: Callable[..., Any], arrays: tuple[jax.Array, ...], segments: np.ndarray, mask: PackedMask
) -> None:
    """Changing a document changes no bit of any other document's output and gradients."""
    before = results(*arrays, mask)
    rng = np.random.default_rng(0)
    for row in range(segments.shape[0]):
        chosen = segments[row] == rng.choice(segments[row])  # a document, or the padding
        touched = np.zeros(segments.shape, bool)
        touched[row] = chosen
        changed = [jnp.where(touched[..., None, None], 100 * x + 1, x) for x in arrays]
        for name, old, new in zip(RESULTS, before, results(*changed, mask), strict=True):
            same = np.asarray(old == new).all(axis=(2, 3))
            assert same[~touched].all(), f"{name} of row {row} changed outside of the changed document"
            if name == "o" and segments[row][chosen].any():
                assert not same[touched].all(), f"the change of row {row} had no effect"


def assert_padding_is_zero(
    results: Callable[..., Any], arrays: tuple[jax.Array, ...], segments: np.ndarray, mask: PackedMask
) -> None:
    for name, x in zip(RESULTS, results(*arrays, mask), strict=True):
        assert np.isfinite(np.asarray(x, np.float32)).all(), name
        assert not np.asarray(x, np.float32)[segments == 0].any(), name
