"""Checks on a few steps that the same seed gives the same bytes: starts and compiles a run twice, and compares."""

import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from flacuna_jax.model.parameters import Params
from flacuna_jax.training.loop import to_devices
from flacuna_jax.training.state import TrainState
from flacuna_jax.training.step import Step

STEPS = 3


class Beginning(NamedTuple):
    state: TrainState
    frozen: Params
    step: Step
    """Not compiled yet."""
    batches: Iterator[dict[str, np.ndarray]]


class NotDeterministic(RuntimeError):
    """Two runs from the same seed differ."""


def check_determinism(
    begin: Callable[[], Beginning], batch_sharding: NamedSharding, steps: int, say: Callable[[str], None]
) -> None:
    """Runs up to `STEPS` steps twice, and prints a digest of the trained state after each step.

    Users can compare digests of two processes, or of two machines of the same kind.

    Raises:
      NotDeterministic: names the first step after which a byte differs.
    """
    count = min(STEPS, steps)
    first, second = (_digests(begin, batch_sharding, count) for _ in range(2))
    for number, (one, other) in enumerate(zip(first, second, strict=True), 1):
        if one != other:
            raise NotDeterministic(
                f"after step {number} the same seed gave different bytes: {one[:16]} and {other[:16]}"
                + (
                    "; on GPUs XLA_FLAGS=--xla_gpu_deterministic_ops=true fixes the order of sums"
                    if jax.default_backend() == "gpu"
                    else ""
                )
            )
        say(f"step {number}: twice {one[:16]}")
    say(f"deterministic: {count} steps gave the same bytes twice (weights, optimizer state, loss, gradient norm)")


def _digests(begin: Callable[[], Beginning], batch_sharding: NamedSharding, count: int) -> list[str]:
    state, frozen, step, batches = begin()
    digests = []
    for _ in range(count):
        trainable, opt_state, metrics = step(
            state.trainable, state.opt_state, frozen, to_devices(next(batches), batch_sharding), np.int32(state.step)
        )
        state = TrainState(state.step + 1, trainable, opt_state)
        digests.append(_digest((trainable, opt_state, metrics)))
    return digests


def _digest(tree: object) -> str:
    """SHA-256 of every byte of every array, in the order of the tree; includes the shards of all hosts."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        whole = leaf if leaf.is_fully_addressable else multihost_utils.process_allgather(leaf, tiled=True)
        digest.update(np.ascontiguousarray(whole).tobytes())
    return digest.hexdigest()
