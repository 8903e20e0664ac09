"""Sizes of a network: every difference between members of the family is a field here."""

import dataclasses
import functools
import math
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from flacuna_jax.kernels.packed_mask import PackedMask
from flacuna_jax.model.rope import Rope, RopeScaling, ntk_theta, rope_frequencies

T = TypeVar("T")
Array = TypeVar("Array", jax.Array, np.ndarray)

Family = Literal[
    "llama",
    "mistral",
    "ministral",
    "qwen2",
    "qwen3",
    "olmo2",
    "granite",
    "smollm3",
    "olmo3",
    "gemma2",
    "gemma3_text",
    "phi3",
]


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a LLaMA or a similar model, from the config.json of its checkpoint."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    family: Family = "llama"
    """Hugging Face's model_type; the network depends only on the other fields."""
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None
    """Maximum number of keys visible to a query, including itself (Mistral), in the `windowed_layers`."""
    biases: tuple[str, ...] = ()
    """Projections with a bias (Qwen2: q, k and v)."""
    # The fields below are not in the repr, which identifies the base of runs that began before they existed.
    norms: Literal["before", "after", "around"] = dataclasses.field(default="before", repr=False)
    """Whether attention and feed-forward normalise their input, their output (OLMo 2), or both (Gemma 2)."""
    norm_offset: float = dataclasses.field(default=0.0, repr=False)
    """Added to the weights of all norms (Gemma: 1). Their products are then rounded once, not twice."""
    qk_norm: Literal["head", "all"] | None = dataclasses.field(default=None, repr=False)
    """A norm of queries and keys: of each head (Qwen3), or over all heads (OLMo 2)."""
    layers_without_rope: tuple[int, ...] = dataclasses.field(default=(), repr=False)
    """Layers in which queries and keys are not rotated (SmolLM3)."""
    activation: Literal["silu", "gelu", "gelu_tanh"] = dataclasses.field(default="silu", repr=False)
    """Of the gates. gelu_tanh is the approximation by tanh."""
    embedding_multiplier: float = dataclasses.field(default=1.0, repr=False)
    """Granite scales embeddings (Gemma, too), ..."""
    attention_multiplier: float | None = dataclasses.field(default=None, repr=False)
    """... the products of queries and keys (None: 1 / sqrt(head_dim)), ..."""
    residual_multiplier: float = dataclasses.field(default=1.0, repr=False)
    """... what a layer adds to the residual stream, ..."""
    logits_scaling: float = dataclasses.field(default=1.0, repr=False)
    """... and divides the logits by this number."""
    windowed_layers: tuple[int, ...] | None = dataclasses.field(default=None, repr=False)
    """The layers to which `sliding_window` applies; None: all."""
    windowed_rope_theta: float | None = dataclasses.field(default=None, repr=False)
    """The rotary base of the layers with a window, without scaling (Gemma 3); None: that of the others."""
    partial_rotary_factor: float = dataclasses.field(default=1.0, repr=False)
    """The fraction of each head that is rotated, from its first dimension on (Phi-4-mini)."""
    fused_projections: bool = dataclasses.field(default=False, repr=False)
    """Whether files have q, k and v as one matrix, and gate and up as one (Phi-3). The network has them separately."""
    attention_softcap: float | None = dataclasses.field(default=None, repr=False)
    """The soft cap of attention's scores (Gemma 2), ..."""
    logits_softcap: float | None = dataclasses.field(default=None, repr=False)
    """... and of the logits; see `kernels.softcap`."""

    @property
    def context_length(self) -> int:
        """Maximum number of positions. LongRoPE has other frequencies beyond its original context, which are not
        implemented."""
        scaling = self.rope_scaling
        if scaling is not None and scaling.kind == "longrope":
            return min(self.max_position_embeddings, scaling.original_max_position_embeddings)
        return self.max_position_embeddings

    @property
    def attention_scale(self) -> float:
        """Of the products of queries and keys."""
        return self.head_dim**-0.5 if self.attention_multiplier is None else self.attention_multiplier

    @property
    def rope_frequencies(self) -> np.ndarray:
        return rope_frequencies(self._rotated, self.rope_theta, self.rope_scaling)

    @property
    def _rotated(self) -> int:
        """The dimensions of a head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def windows_differ(self) -> bool:
        """Whether only some layers have a window."""
        return self.sliding_window is not None and self.windowed_layers is not None

    @property
    def count_windowed(self) -> int:
        """Number of layers with a window."""
        return sum(self.in_layer(layer, True, False) for layer in range(self.num_layers))

    def in_layer(self, layer: jax.Array | int, windowed: T, whole: T) -> T:
        """`windowed` if a layer has a window, otherwise `whole`: arrays, or pytrees of the same structure."""
        if self.sliding_window is None or self.windowed_layers is None:
            return whole if self.sliding_window is None else windowed
        if isinstance(layer, int):
            return windowed if layer in self.windowed_layers else whole
        has_window = _among(self.windowed_layers, self.num_layers)[layer]
        return jax.tree.map(functools.partial(jnp.where, has_window), windowed, whole)

    def masks(self, mask: PackedMask) -> tuple[PackedMask, PackedMask]:
        """The masks of layers with and without a window, for `in_layer`, from that of whole documents."""
        if self.sliding_window is None:
            return mask, mask
        windowed = mask.within(self.sliding_window)
        return (windowed.without_promises(), mask.without_promises()) if self.windows_differ else (windowed, windowed)

    def first_visible(self, layer: jax.Array | int, positions: Array) -> Array:
        """The first position visible to queries at these positions, apart from the boundaries of documents."""
        window = self.sliding_window or 0
        return self.in_layer(layer, positions - (window - 1), positions * 0)

    def ropes_at(self, positions_bt: jax.Array) -> tuple[Rope, Rope]:
        """The rotary embeddings of layers with and without a window, for `rope_in`."""
        factor = 1.0 if self.rope_scaling is None else self.rope_scaling.attention_factor
        rope = Rope.at(positions_bt, self.rope_frequencies, factor)
        if self.windowed_rope_theta is None:
            return rope, rope
        return Rope.at(positions_bt, rope_frequencies(self._rotated, self.windowed_rope_theta, None)), rope

    def rope_in(self, layer: jax.Array | int, ropes: tuple[Rope, Rope]) -> Rope:
        """The rotary embedding of a layer, from `ropes_at`."""
        rope = ropes[1] if self.windowed_rope_theta is None else self.in_layer(layer, *ropes)
        if not self.layers_without_rope:
            return rope
        return rope.unless(_among(self.layers_without_rope, self.num_layers)[layer])

    def stretched(self, kind: Literal["linear", "ntk", "llama3"], factor: float, **llama3: Any) -> "LlamaConfig":
        """Sizes for a context `factor` times as long. `ntk` only changes `rope_theta`, so every program can load it."""
        own = self.max_position_embeddings
        longer = dataclasses.replace(self, max_position_embeddings=math.ceil(own * factor))
        if kind == "ntk":
            return dataclasses.replace(longer, rope_theta=ntk_theta(self.rope_theta, self._rotated, factor))
        if kind == "linear":
            return dataclasses.replace(longer, rope_scaling=RopeScaling("linear", factor))
        scaling = RopeScaling("llama3", factor, original_max_position_embeddings=own, **llama3)
        return dataclasses.replace(longer, rope_scaling=scaling)


def _among(layers: tuple[int, ...], count: int) -> jax.Array:
    """Whether each of `count` layers is one of `layers`."""
    return jnp.asarray(np.isin(np.arange(count), layers))
