"""`continuation.advance` layer by layer, for a small model on one CPU: one program is compiled for a layer, and called
for each layer in turn. A program for all layers would take too long to compile, and one that scans over stacked weights
would copy each layer before it multiplies it. Shape suffixes as in `continuation`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from flacuna_jax.generation import continuation
from flacuna_jax.generation.caches import Block, Rows
from flacuna_jax.generation.continuation import Chosen, Recent
from flacuna_jax.generation.decode import Numbers
from flacuna_jax.generation.shared_prefix import Params, Prefix, through_layer
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.model.rope import Rope

SMALL_STACK = 4 << 30
"""Maximum size of all layers in bytes for which their parameters are also held separately."""

Layer = list[jax.Array]
"""The leaves of the state of a layer."""
Ropes = tuple[Rope, Rope]
"""The result of `LlamaConfig.ropes_at`."""
Cache = tuple[jax.Array, jax.Array]
"""The keys and values of a layer in a block of the caches."""


def layers_apart(spec: ModelSpec, params: Params) -> list[Layer] | None:
    """The parameters of each layer separately if that is faster: for a small model on one CPU; otherwise None.

    With several devices, programs of several layers would run at the same time. On CPUs, XLA lets each wait for threads
    that the others hold if they exchange data between devices.
    """
    parameters = spec.held | spec.adapters
    size = sum(array.nbytes for path, array in params.items() if parameters[path].stacked)
    several = any(len(array.sharding.device_set) > 1 for array in params.values())
    if jax.default_backend() != "cpu" or several or size > SMALL_STACK:
        return None
    stacked = jax.tree.leaves(nnx.state(spec.merge(params).layers))
    return [[_layer_of(index, leaf) for leaf in stacked] for index in range(spec.config.num_layers)]


def _layer_of(index: int, stacked: jax.Array) -> jax.Array:
    """One layer of a stacked parameter, on a CPU. Compiling programs for this takes longer than the rest of a start."""
    sharding = stacked.sharding
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return jax.device_put(np.asarray(stacked)[index], sharding)


class Parts(NamedTuple):
    """The programs of a step."""

    enter: Callable[..., tuple[jax.Array, Ropes]]
    layer: Callable[..., tuple[jax.Array, Recent]]
    leave: Callable[..., Chosen]


@functools.lru_cache(maxsize=8)
def parts_of(spec: ModelSpec) -> Parts:
    """Bound to the spec, because comparing it with that of earlier calls would take a part of the time of a layer."""
    enter, layer = jax.jit(functools.partial(_enter, spec)), jax.jit(functools.partial(_through_layer, spec))
    return Parts(enter, layer, jax.jit(functools.partial(_leave, spec), static_argnames=("alternatives",)))


def advance(
    spec: ModelSpec,
    params: Params,
    layers: Sequence[Layer],
    prefix: Prefix | None,
    rows: Rows,
    method: Numbers | int,
    scored: Numbers | bool = False,
    *,
    steps: int,
    count: int,
    blocks: int,
    alternatives: int = 0,
) -> tuple[Rows, Chosen]:
    """As `continuation.advance`, with the result of `layers_apart`. The rows are donated."""
    enter, through, leave = parts_of(spec)
    numbers, of_layers = rows._replace(blocks=()), [_of_layer(rows, index) for index in range(len(layers))]
    used, caches = numbers, [of_layer[:blocks] for of_layer in of_layers]
    if count < len(rows.token_b):
        used, caches = _first(used, count=count), [_first(of_layer, count=count) for of_layer in caches]
    recents = [_nothing(spec, count, steps)] * len(layers)
    token_b, found = used.token_b, []
    for step in range(steps):
        made = np.int32(step)
        x_b1d, ropes = enter(params, token_b, prefix, used.length_b, made)
        for index, layer in enumerate(layers):
            place, seen = np.int32(index), (caches[index], used.length_b, recents[index], made)
            x_b1d, recents[index] = through(layer, place, x_b1d, ropes, prefix, *seen, used.columns_b2)
        found.append(leave(params, x_b1d, used, made, method, scored, alternatives=alternatives))
        token_b = found[-1].token
    chosen = _together(found)
    written = [_written(*of_layer) for of_layer in zip(of_layers, [used.length_b] * len(layers), recents, strict=True)]
    together = tuple(Block(*map(list, zip(*of_layers, strict=True))) for of_layers in zip(*written, strict=True))
    return _numbers(numbers, chosen.token)._replace(blocks=together), chosen


def _of_layer(rows: Rows, index: int) -> tuple[Cache, ...]:
    return tuple((block.k[index], block.v[index]) for block in rows.blocks)


def _enter(
    spec: ModelSpec,
    params: Params,
    token_b: jax.Array,
    prefix: Prefix | None,
    length_b: jax.Array,
    made: jax.Array,
) -> tuple[jax.Array, Ropes]:
    """What the first layer takes, and what all of them take: XLA would compute a layer's cosines for every head."""
    ropes = spec.config.ropes_at(continuation.positions(prefix, length_b, made)[:, None])
    return spec.merge(params).embed(token_b[:, None]), ropes


def _through_layer(
    spec: ModelSpec,
    leaves: Layer,
    index: jax.Array,
    x_b1d: jax.Array,
    ropes: Ropes,
    prefix: Prefix | None,
    blocks: Sequence[Cache],
    length_b: jax.Array,
    recent: Recent,
    made: jax.Array,
    columns_b2: jax.Array | None,
) -> tuple[jax.Array, Recent]:
    config = spec.config
    graph, abstract = nnx.split(nnx.merge(*spec.abstract).layers)
    state = jax.tree.unflatten(jax.tree.structure(abstract), leaves)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, layer: int | jax.Array) -> jax.Array:
        return continuation.attend_in_rows(config, layer, prefix, blocks, length_b, recent, made, q, k, v)

    x_b1d, (k_b1kn, v_b1kn) = through_layer(config, graph, state, index, x_b1d, ropes, attend, columns_b2)
    return x_b1d, recent.with_new(k_b1kn, v_b1kn, made)


def _leave(
    spec: ModelSpec,
    params: Params,
    x_b1d: jax.Array,
    rows: Rows,
    made: jax.Array,
    method: Numbers | int,
    scored: Numbers | bool,
    alternatives: int,
) -> Chosen:
    """The next tokens, from what the last layer gives."""
    model = continuation.for_rows(spec.merge(params), rows.columns_b2)
    logits_bv = model.logits(model.final(x_b1d))[:, 0]
    return continuation.choose(logits_bv, rows, made, method, scored, alternatives)


@functools.partial(jax.jit, static_argnames=("spec", "rows", "steps"))
def _nothing(spec: ModelSpec, rows: int, steps: int) -> Recent:
    return Recent.nothing(spec, rows, steps)


_first = functools.partial(jax.jit, static_argnames=("count",))(
    lambda arrays, count: jax.tree.map(lambda x: x[:count], arrays)
)


@jax.jit
def _together(chosen: Sequence[Chosen]) -> Chosen:
    return jax.tree.map(lambda *of_steps: jnp.stack(of_steps, axis=1), *chosen)


@functools.partial(jax.jit, donate_argnames=("blocks",))
def _written(blocks: Sequence[Cache], length_b: jax.Array, recent: Recent) -> Sequence[Cache]:
    listed = tuple(Block([k], [v]) for k, v in blocks)
    written = continuation.with_recent(listed, length_b, jax.tree.map(lambda x: x[None], recent))
    return [(k, v) for (k,), (v,) in written]


_numbers = jax.jit(continuation.advanced)
