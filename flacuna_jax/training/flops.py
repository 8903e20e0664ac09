"""How much arithmetic a step of the model is, for model FLOP/s utilisation (Chowdhery et al., 2022, appendix B).

Counted is what the mathematics needs: no padding, no recomputation, attention over what each document sees (its lower
triangle, where the paper counts the whole square), the head at supervised positions, weight gradients only of what
trains.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from flacuna_jax.data.pipeline import StepInfo
from flacuna_jax.model.parameters import ModelSpec, count


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """FLOP of a step: `per_token`, `per_supervised` token, and `per_pair` of a token with one it attends to."""

    per_token: float
    per_supervised: float
    per_pair: float

    @classmethod
    def of(cls, spec: ModelSpec) -> "StepFlops":
        sizes = spec.config
        matrices = count({path: p.shape for path, p in spec.base.items() if p.kind == "matrix" and p.stacked})
        head = sizes.vocab_size * sizes.hidden_size
        # A product costs 2 FLOP per weight and token forward, as much for the gradient of its input, and as much again
        # for that of the weight, if it trains.
        products = 4 if spec.lora is not None else 6
        adapters = count(spec.lora_shapes)
        # Two products forward, four backward, per pair, head and number in a head.
        attention = 12 * sizes.num_layers * sizes.num_heads * sizes.head_dim
        return cls(products * matrices + 6 * adapters, products * head, attention)

    def count(self, lengths: NDArray[np.int64], supervised: int) -> float:
        """Of a step with documents of these lengths, of whose tokens so many carry loss."""
        tokens, pairs = int(lengths.sum()), float((lengths * (lengths + 1) / 2).sum())
        return self.per_token * tokens + self.per_supervised * supervised + self.per_pair * pairs


def flops_of_step(flops: StepFlops, lengths: NDArray[np.int64], info: StepInfo) -> float:
    """Of what a step held; `lengths` are those of all examples."""
    return flops.count(lengths[info.example_indices], info.supervised_tokens)
