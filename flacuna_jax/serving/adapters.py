"""The models that a server offers: one base, and adapters that share it in one batch."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import get_args

import jax
import numpy as np

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.config.types import Target
from flacuna_jax.data.conversation import Template
from flacuna_jax.data.tokenization import Tokenizer
from flacuna_jax.errors import UserError
from flacuna_jax.generation.decoder import Network
from flacuna_jax.huggingface.adapter import Adapter
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.model.sharding import parameter_shardings
from flacuna_jax.serving.token_texts import TokenTexts

_SMALLEST_WIDTH = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Served:
    """A model that requests can name: the base, or the base with an adapter.

    Attributes:
      tokenizer: that of the base, or the adapter's own.
      template: wraps conversations.
      ends: tokens that end its answers.
      adapter: None for the base.
      columns: first and end of the adapter's columns among those of all adapters.
    """

    name: str
    tokenizer: Tokenizer
    template: Template
    ends: tuple[int, ...]
    adapter: Adapter | None = None
    columns: tuple[int, int] = (0, 0)

    @functools.cached_property
    def texts(self) -> TokenTexts:
        return TokenTexts(self.tokenizer)


@dataclasses.dataclass(frozen=True)
class Models:
    """The offered models by name, the base first, and the network that has all of them."""

    base: Network
    offered: Mapping[str, Served]
    network: Network

    @classmethod
    def of(cls, base: Network, model: Served) -> "Models":
        return cls(base, {model.name: model}, base)

    @property
    def first(self) -> Served:
        """The base as a model."""
        return next(iter(self.offered.values()))

    def with_adapter(self, model: Served) -> "Models":
        """Gives the adapter of a model its columns. Raises UserError if the model's name is taken."""
        if model.name in self.offered:
            raise UserError(f"a model named {model.name!r} is loaded; unload it first, or choose another name")
        assert model.adapter is not None
        rank = max(ranks.largest for ranks in model.adapter.spec.ranks.values())
        first = _first_gap([other.columns for other in self.offered.values() if other.adapter], rank)
        return self._with({**self.offered, model.name: dataclasses.replace(model, columns=(first, first + rank))})

    def without(self, name: str) -> "Models":
        """Raises UserError if no adapter has this name."""
        if name not in self.offered or self.offered[name].adapter is None:
            raise UserError(f"no adapter is named {name!r}")
        return self._with({other: model for other, model in self.offered.items() if other != name})

    def _with(self, offered: Mapping[str, Served]) -> "Models":
        spec, adapters = side_by_side(self.base.spec, list(offered.values()))
        shardings = parameter_shardings(spec.adapters, self.base.mesh)
        placed = {path: jax.device_put(value, shardings[path]) for path, value in adapters.items()}
        return Models(self.base, offered, Network(spec, {**self.base.params, **placed}, self.base.mesh))


def require_factors(name: str, adapter: Adapter) -> None:
    """Raises UserError for an adapter that is more than A and B, which cannot share a batch with others."""
    kinds = {part.kind for part in adapter.spec.adapters.values()}
    more = ["changes tensors of the base"] if adapter.changes is not None else []
    more += ["uses DoRA"] if "lora_magnitude" in kinds else []
    more += ["trains rows of tokens"] if "token_rows" in kinds else []
    if more:
        raise UserError(
            f"adapter {name!r} {' and '.join(more)}, so it cannot share a batch with other adapters; serve the model "
            "that `flacuna export --format merged` writes"
        )


def _first_gap(taken: Sequence[tuple[int, int]], size: int) -> int:
    """The first column from which on `size` columns are free."""
    first = 0
    for begin, end in sorted(taken):
        if begin - first >= size:
            break
        first = end
    return first


def side_by_side(base: ModelSpec, models: Sequence[Served]) -> tuple[ModelSpec, dict[str, np.ndarray]]:
    """All adapters as one whose rank is the number of columns: see `lora.select_columns`.

    The number of columns is a power of two, so that most changes need no other compiled programs.
    """
    adapted = [(model.adapter, model.columns) for model in models if model.adapter is not None]
    if not adapted:
        return base, {}
    end = max(columns[1] for _, columns in adapted)
    width = max(_SMALLEST_WIDTH, 1 << (end - 1).bit_length())
    targets = tuple(target for target in get_args(Target) if any(target in a.lora.targets for a, _ in adapted))
    lora = LoraConfig(rank=width, alpha=float(width), dropout=0.0, targets=targets)
    spec = dataclasses.replace(base, lora=lora)
    params = {path: np.zeros(shape, np.float32) for path, shape in spec.lora_shapes.items()}
    for adapter, (first, _) in adapted:
        for module, (_, scales) in adapter.spec.ranks.items():
            a, b = adapter.params[f"{module}/lora_a"], adapter.params[f"{module}/lora_b"]
            place = slice(first, first + b.shape[-1])
            params[f"{module}/lora_a"][..., place, :] = a
            params[f"{module}/lora_b"][..., place] = b * scales.reshape(*b.shape[:-2], 1, 1)
    return spec, params
