"""Milliseconds and GFLOP/s of forms of a product with a matrix, and of its gradients, on this machine's first device.

    python benchmarks/products.py
    python benchmarks/products.py --tokens 128 --matrix 256 128 --budget 0.02     # tiny

The forms of `kernels/products.py` beside the plain ones, in float32 and bfloat16, and one token, computed as one or as
two. The time is that of the fastest call. With `--matrices 40`, a call multiplies with 40 matrices in turn, so that
they come from memory, as in decoding. `--json FILE` writes everything.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from measure import environment_here, print_table, seconds_of, write_json

from flacuna_jax.kernels.products import matrix_first, rounded_product

Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def plain(x_ti: jax.Array, matrix_oi: jax.Array, cotangent_to: jax.Array) -> jax.Array:
    return jnp.einsum("ti,oi->to", x_ti, matrix_oi)


def rounded(x_ti: jax.Array, matrix_oi: jax.Array, cotangent_to: jax.Array) -> jax.Array:
    return rounded_product(x_ti, matrix_oi, x_ti.dtype)


def first(x_ti: jax.Array, matrix_oi: jax.Array, cotangent_to: jax.Array) -> jax.Array:
    return matrix_first(x_ti, matrix_oi).astype(x_ti.dtype)


def as_two(x_ti: jax.Array, matrix_oi: jax.Array, cotangent_to: jax.Array) -> jax.Array:
    return rounded(jnp.concatenate([x_ti, x_ti]), matrix_oi, cotangent_to)[:1]


def of_x(x_ti: jax.Array, matrix_oi: jax.Array, cotangent_to: jax.Array) -> jax.Array:
    return jnp.einsum("to,oi->ti", cotangent_to, matrix_oi)


def of_x_rounded(x_ti: jax.Array, matrix_oi: jax.Array, cotangent_to: jax.Array) -> jax.Array:
    return gradients_rounded(x_ti, matrix_oi, cotangent_to)[0]


def of_matrix(x_ti: jax.Array, matrix_oi: jax.Array, cotangent_to: jax.Array) -> jax.Array:
    return jnp.einsum("to,ti->oi", cotangent_to, x_ti)


def of_matrix_rounded(x_ti: jax.Array, matrix_oi: jax.Array, cotangent_to: jax.Array) -> jax.Array:
    return gradients_rounded(x_ti, matrix_oi, cotangent_to)[1]


def gradients_rounded(x_ti: jax.Array, matrix_oi: jax.Array, cotangent_to: jax.Array) -> tuple[jax.Array, jax.Array]:
    _, pull = jax.vjp(lambda x_ti, matrix_oi: rounded_product(x_ti, matrix_oi, x_ti.dtype), x_ti, matrix_oi)
    of_x_ti, of_matrix_oi = pull(cotangent_to)
    return of_x_ti, of_matrix_oi


FORMS: dict[str, Product] = {
    "the product": plain,
    "computed in float32, then rounded": rounded,
    "the same, with the matrix as the first operand": first,
    "gradient of x": of_x,
    "gradient of x, rounded": of_x_rounded,
    "gradient of W": of_matrix,
    "gradient of W, first operand transposed in memory, rounded": of_matrix_rounded,
}
OF_ONE_TOKEN: dict[str, Product] = {"one token": rounded, "one token, as two": as_two}


def seconds(form: Product, tokens: int, matrix: tuple[int, int], count: int, dtype: str, budget: float) -> float:
    """Of one product, in calls with `count` matrices."""
    keys = jax.random.split(jax.random.key(0), 2 + count)
    shapes = [(tokens, matrix[1]), (tokens, matrix[0]), *[matrix] * count]
    x_ti, cotangent_to, *matrices = (
        jax.random.normal(key, shape, jnp.float32).astype(dtype) for key, shape in zip(keys, shapes, strict=True)
    )

    @jax.jit
    def in_turn(x_ti: jax.Array, cotangent_to: jax.Array, matrices: list[jax.Array]) -> list[jax.Array]:
        results = []
        for matrix_oi in matrices:
            # The barrier makes each product wait for the previous one.
            x_ti, result = jax.lax.optimization_barrier((x_ti, form(x_ti, matrix_oi, cotangent_to)))
            results.append(result)
        return results

    jax.block_until_ready(in_turn(x_ti, cotangent_to, matrices))
    call = seconds_of(
        lambda _: jax.block_until_ready(in_turn(x_ti, cotangent_to, matrices)), budget, least=10, most=1000
    )
    return min(call) / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1280)
    parser.add_argument("--matrix", type=int, nargs=2, default=(1536, 576), metavar=("OUT", "IN"))
    parser.add_argument("--matrices", type=int, default=1, help="number of matrices that a call multiplies with (1)")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for each form (1)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    matrix = tuple(arguments.matrix)
    rows = []
    for dtype in ("float32", "bfloat16"):
        for tokens, forms in ((arguments.tokens, FORMS), (1, OF_ONE_TOKEN)):
            for name, form in forms.items():
                spent = seconds(form, tokens, matrix, arguments.matrices, dtype, arguments.budget)
                gflops = 2 * tokens * matrix[0] * matrix[1] / spent / 1e9
                rows.append((name, dtype, 1000 * spent, gflops))
    header = ("form", "dtype", "ms", "GFLOP/s")
    print_table(header, rows)
    if arguments.json:
        write_json(
            arguments.json,
            {
                "environment": environment_here(),
                "matrix": matrix,
                "matrices": arguments.matrices,
                "products": [dict(zip(header, row, strict=True)) for row in rows],
            },
        )


if __name__ == "__main__":
    main()
