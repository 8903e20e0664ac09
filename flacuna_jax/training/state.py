"""The training state: its arrays, its abstract layout, and its initial value."""

import dataclasses
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from flacuna_jax.model.parameters import ModelSpec, Params, fresh_adapters
from flacuna_jax.model.sharding import abstract_arrays
from flacuna_jax.training.optimizer import optimizer_state_shardings


@dataclasses.dataclass(frozen=True)
class TrainState:
    """Trainable parameters and optimizer state after `step` updates."""

    step: int
    trainable: Params
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class StateLayout:
    """Shapes, dtypes and shardings of a `TrainState`, without allocated arrays."""

    spec: ModelSpec
    optimizer: optax.GradientTransformation
    mesh: Mesh

    @property
    def trainable(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Abstract trainable parameters: the adapters, or all weights in full fine-tuning. Always float32."""
        return abstract_arrays(self.spec.trainable, self.mesh)

    @property
    def opt_state(self) -> Any:
        """Abstract optimizer state; moments are sharded like their parameters."""
        shardings = self.shardings[1]
        abstract = jax.eval_shape(self.optimizer.init, self.trainable)
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)

    @property
    def shardings(self) -> tuple[dict[str, jax.sharding.NamedSharding], Any]:
        """Shardings of trainable parameters and optimizer state."""
        trainable = self.trainable
        of_parameters = {name: leaf.sharding for name, leaf in trainable.items()}
        return of_parameters, optimizer_state_shardings(self.optimizer, trainable, of_parameters, self.mesh)

    def begin(self, trainable: Params) -> TrainState:
        """The state before the first step."""
        opt_state = jax.jit(self.optimizer.init, out_shardings=self.shardings[1])(trainable)
        return TrainState(0, trainable, opt_state)

    def fresh_adapters(self, seed: int, base: Params | None = None) -> Params:
        """See `model.parameters.fresh_adapters`; `base` is needed with DoRA."""
        return fresh_adapters(self.spec, base or {}, seed, self.mesh)
