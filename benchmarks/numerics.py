"""Checks the results of the kernels on the device of this machine against a float32 oracle.

    python benchmarks/numerics.py

Attention, forward and gradients, in bfloat16 over packings, lengths, head sizes, grouped heads and a window: relative
L2 against the float32 definition at most 5e-3, and at most twice the error of XLA's own bfloat16 attention; padding
exactly 0; other documents do not change any bit; two runs agree in every bit. On a GPU also the backend `cudnn`, on
rows of one document, whose runs need not agree in every bit, and on Hopper and Blackwell the backend `tokamax`, if it
is installed. Cross-entropy is compared with the plain computation. The exit status is 1 if anything is out of bounds or
raises. On a CPU the shapes are small and the backend is XLA's.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import stand_in  # noqa: F401  # before flacuna_jax
from attention import packed_segments
from measure import environment_here, print_table, write_json

from flacuna_jax.kernels import attention_tokamax
from flacuna_jax.kernels.attention import Backend, attention
from flacuna_jax.kernels.attention_reference import attention_reference
from flacuna_jax.kernels.cross_entropy import token_losses
from flacuna_jax.kernels.packed_mask import PackedMask, make_packed_mask

BOUND = 5e-3
"""Maximum error of bfloat16 results; rounding the inputs of the second product alone gives 2e-3 to 3e-3."""
NAMES = ("o", "dq", "dk", "dv")


class Case(NamedTuple):
    name: str
    length: int = 1280
    heads: int = 8
    kv_heads: int = 8
    dim: int = 128
    mean: float | None = 200
    window: int | None = None
    padding: int = 0
    backend: Backend = "auto"


CASES = (
    Case("one document per row", mean=None),
    Case("documents of 30", mean=30),
    Case("documents of 200"),
    Case("documents of 640", mean=640),
    Case("padding at the end", padding=300),
    Case("length 1000", length=1000),
    Case("head_dim 64", dim=64),
    Case("head_dim 96", dim=96),
    Case("grouped heads", kv_heads=2),
    Case("window 256", mean=640, window=256),
)
CUDNN_CASES = (
    Case("cudnn, one document per row", mean=None, backend="cudnn"),
    Case("cudnn, padding, window 256", mean=None, window=256, padding=300, backend="cudnn"),
    Case("cudnn, grouped heads of 64", mean=None, kv_heads=2, dim=64, backend="cudnn"),
)
TOKAMAX_CASES = (
    Case("tokamax, documents of 200, padding", padding=300, backend="tokamax"),
    Case("tokamax, length 1000, head_dim 64", length=1000, dim=64, backend="tokamax"),
    Case("tokamax, grouped heads, window 256", mean=640, window=256, kv_heads=2, backend="tokamax"),
)
"""Only a few, because Mosaic needs seconds to compile each."""


def relative(found: jax.Array, wanted: jax.Array) -> float:
    difference = jnp.linalg.norm((found.astype(jnp.float32) - wanted).ravel())
    return float(difference / jnp.linalg.norm(wanted.ravel()))


def results(function: Any, inputs: tuple[jax.Array, ...], do: jax.Array) -> tuple[jax.Array, ...]:
    o, pull = jax.vjp(function, *inputs)
    return (o, *pull(do.astype(o.dtype)))


def check_attention(case: Case, on_cpu: bool) -> dict[str, Any]:
    length = case.length // 8 if on_cpu else case.length
    segments = packed_segments(2, length, case.mean and (case.mean / 8 if on_cpu else case.mean))
    if case.padding:
        segments[:, -(case.padding // 8 if on_cpu else case.padding) :] = 0
    mask = make_packed_mask(jnp.asarray(segments), case.window, one_document=case.mean is None)
    sizes = [(2, length, h, case.dim) for h in (case.heads, case.kv_heads, case.kv_heads, case.heads)]
    *inputs, do = (jax.random.normal(jax.random.key(i), size, jnp.float32) for i, size in enumerate(sizes))
    reference = partial(attention_reference, mask=mask, scale=case.dim**-0.5)

    @jax.jit
    def ours(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array, mask: PackedMask) -> Any:
        return results(partial(attention, mask=mask, backend=case.backend), (q, k, v), do)

    low = [x.astype(jnp.bfloat16) for x in (*inputs, do)]
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(partial(results, reference))(
            tuple(x.astype(jnp.float32) for x in low[:3]), low[3].astype(jnp.float32)
        )
    of_xla = jax.jit(partial(results, reference))(tuple(low[:3]), low[3])
    found = ours(*low, mask)
    again = ours(*low, mask)
    errors = {n: (relative(f, e), relative(x, e)) for n, f, x, e in zip(NAMES, found, of_xla, exact, strict=True)}

    # The last document of every row is replaced; the others must not change.
    last = jnp.asarray((segments == segments.max(axis=1, keepdims=True)) & (segments > 0))[..., None, None]
    other = [jnp.where(last, jax.random.normal(jax.random.key(9), x.shape).astype(x.dtype), x) for x in low]
    isolated = True
    if case.mean is not None:
        changed = ours(*other, mask)
        isolated = all(
            bool(jnp.all(jnp.where(last, 0, f) == jnp.where(last, 0, c))) for f, c in zip(found, changed, strict=True)
        )
    empty = jnp.asarray(segments == 0)[..., None, None]
    checks = {
        "errors": all(ours <= BOUND and ours <= 2 * xla for ours, xla in errors.values()),
        "isolated": isolated,
        "padding": all(bool(jnp.all(jnp.where(empty, f, 0) == 0)) for f in found),
        "repeats": case.backend == "cudnn" or all(bool(jnp.all(f == a)) for f, a in zip(found, again, strict=True)),
    }
    return {"case": case.name, "errors": errors, "checks": checks, "good": all(checks.values())}


def check_cross_entropy(on_cpu: bool) -> dict[str, Any]:
    rows, length, width, vocab = (2, 64, 32, 128) if on_cpu else (2, 1280, 1024, 32000)
    hidden = jax.random.normal(jax.random.key(0), (rows, length, width)).astype(jnp.bfloat16)
    head = (jax.random.normal(jax.random.key(1), (vocab, width)) * width**-0.5).astype(jnp.bfloat16)
    targets = jax.random.randint(jax.random.key(2), (rows, length), 0, vocab)
    loss_mask = jax.random.bernoulli(jax.random.key(3), 0.3, (rows, length))

    def plain(hidden: jax.Array) -> jax.Array:
        logits = jnp.einsum("btd,vd->btv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
        losses = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(loss_mask, losses, 0.0))

    def ours(hidden: jax.Array) -> jax.Array:
        return jnp.sum(token_losses(hidden, head, targets, loss_mask))

    with jax.default_matmul_precision("highest"):
        exact, exact_gradient = jax.jit(jax.value_and_grad(plain))(hidden.astype(jnp.float32))
    found, gradient = jax.jit(jax.value_and_grad(ours))(hidden)
    of_xla = relative(jax.jit(jax.grad(plain))(hidden), exact_gradient)
    errors = {"loss": (abs(float(found / exact) - 1), 0.0), "gradient": (relative(gradient, exact_gradient), of_xla)}
    good = errors["loss"][0] <= 1e-4 and errors["gradient"][0] <= BOUND
    return {"case": "cross-entropy", "errors": errors, "checks": {"errors": good}, "good": good}


def run() -> list[dict[str, Any]]:
    platform, kind = jax.devices()[0].platform, jax.devices()[0].device_kind
    on_cpu = platform == "cpu"
    cases = (*CASES, *(CUDNN_CASES if platform == "gpu" else ()))
    if attention_tokamax.misfit(128, jnp.bfloat16, platform, kind) is None:
        cases = (*cases, *TOKAMAX_CASES)
    return [*(_or_failure(case, on_cpu) for case in cases), check_cross_entropy(on_cpu)]


def _or_failure(case: Case, on_cpu: bool) -> dict[str, Any]:
    """Runs a case; an exception counts as bad and does not prevent other cases."""
    try:
        return check_attention(case, on_cpu)
    except Exception as error:
        said = (str(error).splitlines() or [""])[0][:120]
        return {"case": case.name, "errors": {}, "checks": {f"{type(error).__name__}: {said}": False}, "good": False}


def show(found: list[dict[str, Any]]) -> None:
    rows = []
    for result in found:
        errors = [f"{name} {100 * ours:.2f} % ({100 * xla:.2f})" for name, (ours, xla) in result["errors"].items()]
        failed = [name for name, good in result["checks"].items() if not good]
        rows.append([result["case"], "good" if result["good"] else f"BAD: {', '.join(failed)}", "  ".join(errors)])
    print_table(("case", "verdict", "relative error against float32 (XLA's own bfloat16)"), rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    found = run()
    show(found)
    if arguments.json:
        write_json(arguments.json, {"environment": environment_here(), "numerics": found})
    return 0 if all(result["good"] for result in found) else 1


if __name__ == "__main__":
    sys.exit(main())
