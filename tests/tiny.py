"""Sizes and packed batches that several tests share."""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.model.variables import Parameter

SMALL = LlamaConfig(
    vocab_size=97, hidden_size=48, intermediate_size=112, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=12
)


def packed_batch(
    documents: list[list[int]], rows: list[list[int]], length: int, loss_from: int = 1
) -> dict[str, np.ndarray]:
    """Rows of documents by index, as arrays [rows, length]; tokens from `loss_from` on are supervised targets."""
    batch = {
        name: np.zeros((len(rows), length), np.int32) for name in ("tokens", "targets", "segment_ids", "positions")
    }
    batch["loss_mask"] = np.zeros((len(rows), length), bool)
    for row, members in enumerate(rows):
        start = 0
        for segment, index in enumerate(members, 1):
            ids = documents[index]
            at = slice(start, start + len(ids))
            batch["tokens"][row, at] = ids
            batch["targets"][row, start : start + len(ids) - 1] = ids[1:]
            batch["loss_mask"][row, start + loss_from - 1 : start + len(ids) - 1] = True
            batch["segment_ids"][row, at] = segment
            batch["positions"][row, at] = range(len(ids))
            start += len(ids)
        assert start <= length
    return batch


def in_steps(batch: dict[str, np.ndarray], micro_batch: int) -> dict[str, np.ndarray]:
    """[rows, length] → [accumulation, micro_batch, length]."""
    return {name: leaf.reshape(-1, micro_batch, leaf.shape[-1]) for name, leaf in batch.items()}


def to_device(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(leaf) for name, leaf in batch.items()}


def described(paths: Iterable[str]) -> dict[str, Parameter]:
    """The descriptions of these parameters in the network, with the sizes of `SMALL`."""
    config = dataclasses.replace(SMALL, biases=("q_proj",))
    known = ModelSpec(config).base | ModelSpec(config, LoraConfig(use_dora=True)).adapters
    return {path: known[path] for path in paths}


def random_params(shapes: dict[str, tuple[int, ...]], scale: float, seed: int = 0) -> dict[str, jax.Array]:
    """Normal arrays of the given names and shapes, norms around one, so that nothing is symmetric or zero."""
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(scale * rng.standard_normal(shape) + ("norm" in name), jnp.float32)
        for name, shape in shapes.items()
    }
