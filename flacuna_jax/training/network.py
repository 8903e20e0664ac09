"""The network of a run with the static settings of its compiled programs."""

import dataclasses
from collections.abc import Mapping

import jax

from flacuna_jax.config.run import RunConfig
from flacuna_jax.kernels.attention import Backend
from flacuna_jax.kernels.cross_entropy import TrainedRows, token_losses, token_scores
from flacuna_jax.kernels.packed_mask import make_packed_mask
from flacuna_jax.model.llama import Llama
from flacuna_jax.model.parameters import ModelSpec, Params

REFERENCE = "reference/"
"""Prefix of the names of a second, frozen adapter among the parameters: that of the reference of a preference."""

Batch = Mapping[str, jax.Array]
"""Packed rows by leaf (see `training.objective`): [accumulation, batch, length]; in a micro-batch [batch, length]."""


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """A network without parameters. Hashable, so that it can be a static argument of a jitted function."""

    spec: ModelSpec
    remat: str = "none"
    attention: Backend = "auto"
    one_document: bool = False
    """Whether every row has at most one document, as `attention: cudnn` requires."""

    @classmethod
    def of_run(cls, spec: ModelSpec, config: RunConfig) -> "NetworkConfig":
        training = config.training
        one_document = config.data.packing == "none" and training.examples == "answers"
        return cls(spec, training.remat, training.attention, one_document)

    def with_params(self, params: Params, row_keys_b: jax.Array | None = None) -> "Network":
        return Network(self, params, row_keys_b)


@dataclasses.dataclass(frozen=True)
class Network:
    """A network with its parameters, which an objective applies to packed rows.

    Args:
      config: static settings.
      params: all parameters, trainable and frozen.
      row_keys_b: a dropout key per row; None switches dropout off.
    """

    config: NetworkConfig
    params: Params
    row_keys_b: jax.Array | None = None

    def token_losses(self, batch: Batch) -> jax.Array:
        """Cross-entropy of each supervised target of a micro-batch, in nats: float32 [batch, length], 0 elsewhere."""
        model, states_btd, trained_columns = self._before_head(batch)
        rows = model.head_rows
        return token_losses(
            states_btd,
            model.head(),
            batch["targets"],
            batch["loss_mask"],
            softcap=model.config.logits_softcap,
            trained_columns=trained_columns or None,
            trained_rows=None if rows is None else TrainedRows(rows.rows[...], rows.ids),
        )

    def token_scores(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """`token_losses`, and whether no other token is more likely than the target: bool [batch, length]."""
        model, states_btd, _ = self._before_head(batch)
        return token_scores(
            states_btd, model.head(), batch["targets"], batch["loss_mask"], softcap=model.config.logits_softcap
        )

    def without_adapters(self) -> "Network":
        """The base by itself, without dropout."""
        return Network(dataclasses.replace(self.config, spec=self.config.spec.without_adapters), self.params)

    def with_reference_adapter(self) -> "Network":
        """The base with the adapter whose names begin with `REFERENCE`, without dropout."""
        adapter = {path: self.params[REFERENCE + path] for path in self.config.spec.adapters}
        return Network(self.config, {**self.params, **adapter})

    def _before_head(self, batch: Batch) -> tuple[Llama, jax.Array, int]:
        """The module, the input states of its head, and the number of their columns that belong to an adapter."""
        config = self.config
        model = config.spec.merge(self.params)
        hidden_btd = model(
            batch["tokens"],
            batch["positions"],
            make_packed_mask(batch["segment_ids"], one_document=config.one_document),
            row_keys_b=self.row_keys_b,
            remat=config.remat,
            attention_backend=config.attention,
        )
        states_btd = model.before_head(hidden_btd, self.row_keys_b)
        return model, states_btd, states_btd.shape[-1] - hidden_btd.shape[-1]
