"""Estimates memory, arithmetic and communication of a step from the sizes, for ranking and without a compiler.

Weights, state and communication follow exactly from the shardings. Saved activations follow from the remat policies,
with constants fitted to compiled programs (docs/results/scaling.md). Memory traffic is a rough count.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from flacuna_jax.config.run import MeshConfig
from flacuna_jax.kernels.axes import BATCH_AXES
from flacuna_jax.kernels.cross_entropy import chunk_size
from flacuna_jax.model.parameters import ModelSpec, count
from flacuna_jax.model.sharding import MESH_AXES, abstract_arrays
from flacuna_jax.model.variables import Parameter
from flacuna_jax.planning.hlo import Collective
from flacuna_jax.planning.workload import Layout, Workload
from flacuna_jax.training.state import StateLayout

MULTIPLYING_AGAIN = ("attention", "full")
"""Remat policies with which the backward pass recomputes the projections."""


@dataclass(frozen=True)
class Work:
    """The work of one optimizer step on each device."""

    matrix_flops: float
    attention_flops: float
    memory_traffic: float
    """Bytes read and written in device memory."""
    collectives: Sequence[Collective]

    @property
    def flops(self) -> float:
        return self.matrix_flops + self.attention_flops


def argument_bytes(workload: Workload, layout: Layout) -> dict[str, int]:
    """Bytes per device of the step's arguments, by kind."""
    spec, mesh = workload.spec, layout.mesh
    rows = workload.micro_batches(layout) * layout.micro_batch
    batch = rows * workload.length * sum(np.dtype(leaf.dtype).itemsize for leaf in workload.step.objective.leaves)
    state = _bytes_per_device(StateLayout(spec, workload.optimizer, _abstract(mesh)).opt_state)
    trained = _stored(spec.trainable, mesh)
    if spec.lora is None:
        return {"weights": trained, "optimizer state": state, "batch": batch}
    return {"base weights": _stored(spec.held, mesh), "adapters": trained, "optimizer state": state, "batch": batch}


def _abstract(mesh: MeshConfig) -> Mesh:
    """A mesh without devices, which shapes and shardings do not need."""
    return cast(Mesh, AbstractMesh(tuple(getattr(mesh, axis) for axis in MESH_AXES), MESH_AXES))


def _stored(parameters: Mapping[str, Parameter], mesh: MeshConfig) -> int:
    """Bytes of parameters on one device."""
    return _bytes_per_device(abstract_arrays(parameters, _abstract(mesh)))


def _bytes_per_device(arrays: Any) -> int:
    leaves = jax.tree.leaves(arrays)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def temporary_bytes(workload: Workload, layout: Layout) -> int:
    """Bytes per device that the step needs in addition to its arguments."""
    spec, config, size, tensor = workload.spec, workload.spec.config, workload.compute_bytes, layout.mesh.tensor
    d, f = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    # Per token and layer: the layer's input; results of products and attention; intermediate results.
    kept: float = d
    if layout.remat != "full":
        kept += q / tensor + 4 * config.num_heads / tensor / size
    if layout.remat in ("dots", "none"):
        kept += d + (q + 2 * kv + 2 * f) / tensor
    if layout.remat == "none":
        kept += 4.5 * d + (q + kv + 2 * f) / tensor
        if spec.lora is not None:
            dropout = spec.lora.dropout > 0
            kept += len(spec.lora.targets) * d * (1.5 if dropout else 0)
    within_layer = 4 * d + (3 * q + 3 * kv + 4 * f) / tensor  # of the layer that is being computed
    activations = workload.tokens_per_pass(layout) * size * (config.num_layers * kept + within_layer)
    head = config.vocab_size * d // tensor * size
    largest = max(math.prod(parameter.layer_shape) for parameter in spec.base.values() if parameter.stacked)
    gathered = (head + 2 * largest // tensor * size) if layout.mesh.fsdp > 1 else 0
    chunk = chunk_size(workload.tokens_per_pass(layout)) * config.vocab_size // tensor * (4 + size)
    if spec.lora is None:
        gradients = _stored(spec.trainable, layout.mesh)
        # Gradients: the sums over micro-batches, those of a micro-batch, and the head's, which is whole on every
        # device.
        return int(activations + gathered + chunk + 2 * gradients + 4 * head // size * (layout.mesh.fsdp > 1))
    # Kernels in compute dtype: recomputing a whole layer needs the three kernels of a feed-forward network at once
    # (before jax 0.12, not if they are gathered). If none are gathered, 4-bit codes are dequantised for each product.
    whole = layout.remat == "full" and (layout.mesh.fsdp == 1 or jax.__version_info__ >= (0, 12))
    copies = 3 * whole + (spec.quantization == "nf4" and layout.mesh.fsdp == 1)
    kernels = copies * largest // tensor * size
    return int(activations + gathered + kernels + chunk + 3 * _stored(spec.trainable, layout.mesh))


def _projections(spec: ModelSpec) -> list[Parameter]:
    """The frozen projections of all layers in their stored form."""
    return [part for part in spec.held.values() if part.stacked and part.kind in ("matrix", "scale")]


def attention_flops(workload: Workload, layout: Layout) -> float:
    """Operations per device and step of the attention kernels: two products forward and five backward, on the visible
    half of each document, in whole tiles."""
    config = workload.spec.config
    keys = config.num_layers * _mean_keys(workload, min(workload.length, workload.statistics.document_length + 128) / 2)
    width = config.num_heads * config.head_dim / layout.mesh.tensor
    passes = 2 * (1 + workload.step.objective.forwards) + 5 + (2 if layout.remat == "full" else 0)
    return passes * 2 * keys * width * _tokens(workload, layout)


def key_tiles(workload: Workload, tile: int) -> float:
    """Mean number of key tiles that a tile of queries needs, over all layers: those from the beginning of the document,
    or of the window, to the queries themselves."""
    return _mean_keys(workload, min(workload.length, workload.statistics.document_length) / 2) / tile + 1


def _mean_keys(workload: Workload, keys: float) -> float:
    """The mean over the layers of `keys`, of which layers with a window see at most the window."""
    config = workload.spec.config
    in_window = min(keys, config.sliding_window or math.inf)
    return keys + (in_window - keys) * config.count_windowed / config.num_layers


def _tokens(workload: Workload, layout: Layout) -> int:
    """Number of positions that one device computes in a step."""
    return workload.micro_batches(layout) * workload.tokens_per_pass(layout)


def head_chunks(workload: Workload, layout: Layout) -> float:
    """Number of chunks of supervised positions that go through the head in one micro-batch."""
    statistics = workload.statistics
    tokens = workload.tokens_per_pass(layout)
    return math.ceil(tokens * statistics.fill * statistics.supervised / chunk_size(tokens))


def estimate_work(workload: Workload, layout: Layout) -> Work:
    spec, config, tensor = workload.spec, workload.spec.config, layout.mesh.tensor
    tokens, micro_batches = _tokens(workload, layout), workload.micro_batches(layout)
    weights = count({path: p.shape for path, p in spec.base.items() if p.stacked and p.kind == "matrix"})
    full_tuning, recomputed = spec.lora is None, layout.remat in MULTIPLYING_AGAIN
    forwards = workload.step.objective.forwards
    passes = 2 + full_tuning + recomputed + forwards
    head_tokens = head_chunks(workload, layout) * chunk_size(workload.tokens_per_pass(layout)) * micro_batches
    head = config.vocab_size * config.hidden_size
    through_head = (4 if full_tuning else 2) + forwards
    matrix_flops = 2 * passes * weights / tensor * tokens + 2 * through_head * head / tensor * head_tokens
    if not full_tuning:
        matrix_flops += 2 * 3 * count(spec.lora_shapes) * tokens / tensor
    size, d = workload.compute_bytes, config.hidden_size
    per_token = 24 * d + (8 * config.num_heads * config.head_dim + 10 * config.intermediate_size) / tensor
    traffic = micro_batches * passes * weights / tensor * size * (2 if layout.mesh.fsdp > 1 else 1)
    if spec.quantization is not None:
        codes = sum(math.prod(part.shape) * part.dtype.itemsize for part in _projections(spec))
        traffic += micro_batches * passes * codes / tensor  # the kernels are dequantised from them
    traffic += tokens * config.num_layers * per_token * size * (2 + recomputed + forwards)
    return Work(matrix_flops, attention_flops(workload, layout), traffic, tuple(_collectives(workload, layout)))


def _collectives(workload: Workload, layout: Layout) -> list[Collective]:
    """The collectives that the layout needs; a test verifies that a compiled program has exactly these."""
    spec, mesh, size = workload.spec, layout.mesh, workload.compute_bytes
    micro_batches = workload.micro_batches(layout)
    layers = spec.config.num_layers
    groups = {axis: mesh_group(mesh, axis) for axis in MESH_AXES}
    rows = mesh_group(mesh, *BATCH_AXES)
    copies = mesh_group(mesh, "replica", "data")
    found: list[Collective] = []

    def exchange(kind: str, nbytes: float, group: tuple[int, ...], times: float) -> None:
        if len(group) > 1:
            found.append(Collective(kind, int(nbytes), group, times, False, "estimated"))

    per_layer = [
        math.prod(part.layer_shape) * (part.dtype.itemsize if spec.quantization else size) // mesh.tensor
        for part in _projections(spec)
    ]
    table = spec.config.vocab_size * spec.config.hidden_size * size // mesh.tensor
    gathers = 2 + (layout.remat in MULTIPLYING_AGAIN)
    for nbytes in per_layer:
        exchange("all-gather", nbytes, groups["fsdp"], gathers * layers * micro_batches)
    exchange("all-gather", table, groups["fsdp"], 2 * micro_batches)
    if spec.lora is None:
        for nbytes in per_layer:
            exchange("reduce-scatter", nbytes, groups["fsdp"], layers * micro_batches)
            exchange("all-reduce", nbytes / mesh.fsdp, copies, layers * micro_batches)
        exchange("all-reduce", 2 * table, rows, 2 * micro_batches)
    else:
        exchange("all-reduce", _stored(spec.adapters, mesh), rows, 1)
    activations = workload.tokens_per_pass(layout) * spec.config.hidden_size * size
    exchange(
        "all-reduce",
        activations,
        groups["tensor"],
        (4 + 2 * (layout.remat in MULTIPLYING_AGAIN)) * layers * micro_batches,
    )
    return found


def mesh_group(mesh: MeshConfig, *axes: str) -> tuple[int, ...]:
    """Positions in the mesh of the devices that differ from the first only along the given axes."""
    grid = np.arange(mesh.devices).reshape([getattr(mesh, axis) for axis in MESH_AXES])
    return tuple(int(i) for i in grid[tuple(slice(None) if axis in axes else 0 for axis in MESH_AXES)].ravel())
