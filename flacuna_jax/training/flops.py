"""Counts the FLOP of a step, for model FLOP/s utilisation (Chowdhery et al., 2022, appendix B).

The count includes only necessary arithmetic: no padding, no recomputation, attention over the visible tokens of each
document (the lower triangle; the paper counts the whole square), the head at supervised positions, and weight gradients
of trainable parameters only.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from flacuna_jax.data.pipeline import StepInfo
from flacuna_jax.model.parameters import ModelSpec, count


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """FLOP of a step: `per_token`, `per_supervised` token, and `per_pair` of a query token and a key token before it,
    in layers that see whole documents, and `per_pair_in_window`."""

    per_token: float
    per_supervised: float
    per_pair: float
    per_pair_in_window: float = 0.0
    window: int = 0

    @classmethod
    def of(cls, spec: ModelSpec, forwards: int = 0) -> "StepFlops":
        """`forwards`: forward passes in addition to that of the loss, without adapters, as those of a reference."""
        sizes = spec.config
        matrices = count({path: p.shape for path, p in spec.base.items() if p.kind == "matrix" and p.stacked})
        head = sizes.vocab_size * sizes.hidden_size
        # Per weight and token, a product costs 2 FLOP forward, 2 for the gradient of its input, and 2 for the gradient
        # of the weight if it is trained.
        products = (4 if spec.lora is not None else 6) + 2 * forwards
        adapters = count(spec.lora_shapes)
        # Two products forward and four backward, for each pair, head and dimension of a head.
        attention = (12 + 4 * forwards) * sizes.num_heads * sizes.head_dim
        windowed = sizes.count_windowed
        return cls(
            products * matrices + 6 * adapters,
            products * head,
            attention * (sizes.num_layers - windowed),
            attention * windowed,
            sizes.sliding_window or 0,
        )

    def count(self, lengths: NDArray[np.int64], supervised: int) -> float:
        """FLOP of a step with documents of these lengths and `supervised` tokens with loss."""
        tokens, pairs = int(lengths.sum()), _pairs(lengths)
        in_window = pairs - _pairs(np.maximum(lengths - self.window, 0))  # without those further apart than the window
        attention = self.per_pair * pairs + self.per_pair_in_window * in_window
        return self.per_token * tokens + self.per_supervised * supervised + attention


def _pairs(lengths: NDArray[np.int64]) -> float:
    return float((lengths * (lengths + 1) / 2).sum())


def flops_of_step(flops: StepFlops, lengths: NDArray[np.int64], info: StepInfo) -> float:
    """FLOP of the examples of a step; `lengths` [examples, documents] are those of all documents of the run."""
    return flops.count(lengths[info.example_indices].reshape(-1), info.supervised_tokens)
