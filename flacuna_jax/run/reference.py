"""The reference of a preference: a second, frozen adapter, or log-probabilities that are computed once before training.

Computed values are stored beside the tokenised corpora, under a hash of everything that they depend on. They are those
of the weights that the run begins with, so a run that continues finds or computes the same ones.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from flacuna_jax.data.pipeline import StepSource, plan_epochs
from flacuna_jax.data.store import TokenStore
from flacuna_jax.data.store_cache import default_directory
from flacuna_jax.model.parameters import Params
from flacuna_jax.model.sharding import batch_sharding, row_shards
from flacuna_jax.run.setup import Setup, first_adapters, load_weights
from flacuna_jax.say import Say
from flacuna_jax.source_code import source_digest
from flacuna_jax.storage.checkpoint import checksum
from flacuna_jax.training.loop import to_devices
from flacuna_jax.training.network import Batch, NetworkConfig
from flacuna_jax.training.preference import by_document
from flacuna_jax.training.state import TrainState
from flacuna_jax.training.step import micro_batch_of
from flacuna_jax.whole_files import replacing

_NUMBERS = ("model", "kernels", "training/network.py", "training/preference.py")
"""Code that affects the values."""


def with_reference(setup: Setup, base: Params, state: TrainState, say: Say) -> Setup:
    """The setup whose examples have the log-probabilities of the reference; unchanged if the objective needs none.

    Args:
      base: the frozen parameters.
      state: of the run; at step 0 in full fine-tuning, its weights are those of the reference.
    """
    if not setup.config.caches_reference:
        return setup
    initial = _Initial(setup, base, state)
    return dataclasses.replace(
        setup,
        store=_scored(setup, setup.store, initial, say),
        held_out=None if setup.held_out is None else _scored(setup, setup.held_out, initial, say),
    )


class _Initial:
    """The weights that a run begins with: the base, with an adapter if the run begins with one."""

    def __init__(self, setup: Setup, base: Params, state: TrainState) -> None:
        self._setup, self._base, self._state = setup, base, state
        config, spec = setup.config, setup.spec
        if config.lora is not None and config.lora.init_from is None:
            spec = spec.without_adapters  # fresh adapters change nothing
        self.network = dataclasses.replace(NetworkConfig.of_run(setup.spec, config), spec=spec)

    @functools.cached_property
    def params(self) -> Params:
        if self._setup.config.lora is None:
            return self._state.trainable if self._state.step == 0 else load_weights(self._setup)
        return self._base if self.network.spec.lora is None else self._base | first_adapters(self._setup, self._base)

    @functools.cached_property
    def identity(self) -> str:
        """In full fine-tuning by samples of each tensor, so that a run that continues does not read them again."""
        if self._setup.config.lora is None:
            return f"{self._setup.meta['fingerprints']['base']} {self._setup.config.seed}"
        return checksum(self.params)


def _scored(setup: Setup, store: TokenStore, initial: _Initial, say: Say) -> TokenStore:
    place = default_directory() / "reference" / f"{_key(setup, store, initial)}.npy"
    values = _stored_on_the_first_host(place, len(store))
    if values is None:
        say(f"reference  computing log-probabilities of {len(store):,} examples")
        values = _log_probabilities(setup, store, initial)
        _store(place, values)
    return dataclasses.replace(store, reference=values)


def _log_probabilities(setup: Setup, store: TokenStore, initial: _Initial) -> NDArray[np.float32]:
    """Of each document's supervised tokens: [examples, documents]. All hosts compute them together."""
    data, mesh = setup.config.data, setup.mesh
    micro_rows = setup.config.training.micro_batch_size * row_shards(mesh)
    everything = dataclasses.replace(store, source_index=np.zeros_like(store.source_index))
    plan = plan_epochs(
        everything,
        max_length=data.max_length,
        packing=data.packing,
        weights=(1.0,),
        seed=0,
        epochs=1,
        rows_per_step=lambda rows, examples: 4 * micro_rows,
        micro_rows=micro_rows,
    )
    source = StepSource(everything, plan, jax.process_index(), jax.process_count())
    score, sharding = _scorer(initial.network, mesh), batch_sharding(mesh)
    values = np.zeros((len(store), store.documents), np.float32)
    place = np.zeros(len(store), np.int32)
    for step in range(plan.total_steps):
        examples = source.info(step).example_indices
        place[examples] = np.arange(len(examples))
        batch = to_devices(source.labelled(step, place), sharding)
        places_n, values_na = jax.device_get(score(initial.params, batch))
        values[examples[places_n[places_n >= 0]]] = values_na[places_n >= 0]
    return values


def _scorer(network: NetworkConfig, mesh: Mesh) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
    """Returns a jitted function: (parameters, labelled batch) → (labels, log-probabilities), on every host.

    Labels are int32 [examples], -1 for unused places; log-probabilities are float32 [examples, 2], one per document.
    """

    def score(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        def of_micro_batch(index: jax.Array) -> tuple[jax.Array, jax.Array]:
            micro_batch = micro_batch_of(batch, index)
            segments_bt, first_bt = micro_batch["segment_ids"], micro_batch["positions"] == 0
            # Labels are below 2^24, which float32 represents exactly.
            labels_bea = by_document(jnp.where(first_bt, micro_batch["labels"] + 1, 0), segments_bt) - 1
            losses_bt = network.with_params(params).token_losses(micro_batch)
            return labels_bea[..., 0].astype(jnp.int32), -by_document(losses_bt, segments_bt)

        labels, values = jax.lax.map(of_micro_batch, jnp.arange(batch["segment_ids"].shape[0]))
        return labels.reshape(-1), values.reshape(-1, 2)

    jitted = jax.jit(score, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def on_mesh(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        with jax.set_mesh(mesh):
            return jitted(params, batch)

    return on_mesh


def _key(setup: Setup, store: TokenStore, initial: _Initial) -> str:
    """A hash of everything that the values depend on; layouts and devices change only their rounding."""
    model, data, lora = setup.config.model, setup.config.data, initial.network.spec.lora
    parts = {
        "data": store.fingerprint,
        "weights": initial.identity,
        "sizes": dataclasses.asdict(setup.source.config),
        "model": model.model_dump(mode="json", include={"dtype", "quantization", "rope_scaling"}),
        "lora": None if lora is None else lora.model_dump(mode="json", exclude={"init_from", "dropout"}),
        "rows": [data.max_length, data.packing],
        "code": source_digest(*_NUMBERS),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _stored_on_the_first_host(place: Path, examples: int) -> NDArray[np.float32] | None:
    """What the first host has stored, on every host; None if it has nothing.

    All hosts compute values together, so that they must agree on whether to. Caches of other hosts do not count.
    """
    values = _stored(place, examples) if jax.process_index() == 0 else None
    if not multihost_utils.broadcast_one_to_all(np.array(values is not None)):
        return None
    received = np.zeros((examples, 2), np.float32) if values is None else values
    return np.asarray(multihost_utils.broadcast_one_to_all(received))


def _stored(place: Path, examples: int) -> NDArray[np.float32] | None:
    """The values at `place`; None if they are not there, or damaged."""
    try:
        values = np.load(place, allow_pickle=False)
    except (OSError, ValueError):
        return None
    return values if values.shape == (examples, 2) and values.dtype == np.float32 else None


def _store(place: Path, values: NDArray[np.float32]) -> None:
    """Writes the values on the first host. Without a writable cache, the next start computes them again."""
    if jax.process_index() == 0:
        with contextlib.suppress(OSError), replacing(place) as partial, partial.open("wb") as file:
            np.save(file, values, allow_pickle=False)
