"""LoRA as a partition of the parameters: `BaseParam` and `LoRAParam` are separate variable types of one module.

Hu et al., 2021 (arXiv:2106.09685), with PEFT's conventions: y = W x + scale · B A dropout(x), A drawn from U(±1/√in),
B zero. Layers are stacked, so a projection has one rank: the largest of all layers. A layer of lower rank, or without
an adapter, has zeros beyond its rank in A and in B. There, neither has a gradient and no optimizer changes them, so
exactly each layer's own rank is trained, counted and exported.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.config.types import HEAD, by_pattern
from flacuna_jax.errors import UserError
from flacuna_jax.kernels.products import times_matrix
from flacuna_jax.model.quantized import KERNELS, Fp8Product, Int8Product, Kernel, Quantization
from flacuna_jax.model.sharding import constrain, gather_weight
from flacuna_jax.model.token_rows import TokenRows
from flacuna_jax.model.variables import Axes, BaseParam, Kind, LoRAParam, LoRAScale, ModuleName, ParamInfo, Rows

OUTPUT_NAME = "projection"
"""Name of every projection's output, including the adapter, for `jax.checkpoint_policies.save_only_these_names`."""

PEFT_LEAVES: dict[Kind, str] = {
    "lora_a": "lora_A.weight",
    "lora_b": "lora_B.weight",
    "lora_magnitude": "lora_magnitude_vector",
}
"""Attribute of a projection, which is also the parameter's kind → PEFT's name for it, after the module's name."""


class Ranks(NamedTuple):
    """Rank and scale of a module's adapter in each layer; a single entry for the head."""

    ranks: np.ndarray
    """int, 0 in layers without an adapter."""
    scales: np.ndarray
    """float32, 0 in layers without an adapter."""

    @property
    def largest(self) -> int:
        return int(self.ranks.max())


def adapter_ranks(lora: LoraConfig | None, name: ModuleName) -> Ranks | None:
    """Rank and scale of a module's adapter in each layer; None if the module is not a target.

    Raises:
      UserError: the config selects a layer that the model does not have.
    """
    if lora is None or name.last not in lora.targets:
        return None
    count, chosen = (1, None) if name.layers is None else (name.layers, lora.layers_to_transform)
    beyond = [layer for layer in chosen or () if layer >= count]
    if beyond:
        raise UserError(f"lora.layers_to_transform: layer {beyond[0]} does not exist; the model has {count} layers")
    ranks, scales = np.zeros(count, int), np.zeros(count, np.float32)
    for layer in range(count) if chosen is None else chosen:
        module = name.of_layer(layer)
        ranks[layer], scales[layer] = lora.rank_of(module), lora.scale_of(module)
    return Ranks(ranks, scales)


def require_matches(lora: LoraConfig, modules: Iterable[ModuleName]) -> None:
    """Raises UserError for a target or a pattern that matches no module of the model, which is probably mistyped.

    `modules` are the modules that can have an adapter.
    """
    found = {module.last: module for module in modules}
    absent = [target for target in lora.targets if target not in found]
    if absent == [HEAD]:
        raise UserError(f"lora.targets: {HEAD} of this model is its embedding table (tie_word_embeddings)")
    if absent:
        raise UserError(f"lora.targets: the model has no module {absent[0]}; it has {', '.join(found)}")
    names = [
        module.of_layer(int(layer))
        for module in map(found.__getitem__, lora.targets)
        if (ranks := adapter_ranks(lora, module)) is not None
        for layer in np.flatnonzero(ranks.ranks)
    ]
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern, value in getattr(lora, key):
            if not any(by_pattern(((pattern, value),), name, None) for name in names):
                raise UserError(
                    f"lora.{key}: {pattern!r} matches the end of no adapter's name; an example of a name is {names[0]}"
                )


class LoRALinear(nnx.Module):
    """A projection [out, in] with an optional low-rank adapter.

    Args:
      name: its name in the network, whose last component is its name in `lora.targets`.
      axes: logical axes (out, in) of the kernel, see `sharding.RULES`.
      lora: settings of the adapters; it has an adapter if it is among the targets.
      layer: its index in the stack, for the rank and scale of this layer.
      rows: its place in a matrix of files with several modules; None if files have it separately.
      bias: whether the projection has a bias; adapters do not change it.
      quantization: quantised form of the kernel; None stores it in `param_dtype`.
      dropout_id: number that is folded into the dropout keys; the projections of a layer have different numbers.
    """

    def __init__(
        self,
        name: ModuleName,
        in_features: int,
        out_features: int,
        *,
        axes: Axes,
        lora: LoraConfig | None,
        layer: jax.Array | int = 0,
        rows: Rows | None = None,
        bias: bool = False,
        quantization: Quantization | None = None,
        dropout_id: int,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        ranks = adapter_ranks(lora, name)
        self.axes, self.dropout_id = axes, dropout_id
        self.lora = lora if ranks is not None else None
        info = ParamInfo(name, "weight", "matrix", axes, rows=rows)
        kernel_oi = base_matrix(rngs.params(), (out_features, in_features), param_dtype)
        hold: Callable[..., BaseParam | Kernel] = BaseParam if quantization is None else KERNELS[quantization]
        self.weight = hold(kernel_oi, info=info)
        if bias:
            info = ParamInfo(name, "bias", "bias", axes[:1])
            self.bias = BaseParam(jnp.zeros((out_features,), param_dtype), info=info)
        if lora is None or ranks is None:
            return

        def adapter(kind: Kind, value: jax.Array, *axes: str | None) -> LoRAParam:
            return LoRAParam(value, info=ParamInfo(name, PEFT_LEAVES[kind], kind, axes, rows=rows))

        rank = jnp.asarray(ranks.ranks)[layer]
        bound, shape_a = in_features**-0.5, (ranks.largest, in_features)
        drawn_ri = jax.random.uniform(rngs.params(), shape_a, jnp.float32, -bound, bound)
        within_r1 = (jnp.arange(ranks.largest) < rank)[:, None]
        self.lora_a = adapter("lora_a", jnp.where(within_r1, drawn_ri, 0), "rank", axes[1])
        self.lora_b = adapter("lora_b", jnp.zeros((out_features, ranks.largest), jnp.float32), axes[0], "rank")
        self.lora_scale = LoRAScale(jnp.asarray(ranks.scales)[layer])
        if lora.use_dora:
            norms_o = jnp.linalg.norm(kernel_oi.astype(jnp.float32), axis=-1)
            self.lora_magnitude = adapter("lora_magnitude", jnp.where(rank > 0, norms_o, 0), axes[0])

    def __call__(self, x_bti: jax.Array, row_keys_b: jax.Array | None = None) -> jax.Array:
        """[batch, length, in] → [batch, length, out] in x's dtype; dropout is applied only if there are keys."""
        weight_oi = self.kernel(x_bti.dtype)
        if isinstance(self.weight, Int8Product | Fp8Product):
            y_bto = self.weight.product(x_bti, self.axes)  # only DoRA also needs the dequantised kernel
        else:
            y_bto = times_matrix(x_bti, weight_oi)
        if self.lora is not None:
            a_ri, b_or = self.factors()
            x_bti = self.dropped(x_bti, row_keys_b)
            y_bto += _by_group(self.low(x_bti, a_ri), b_or.astype(x_bti.dtype))
        y_bto = checkpoint_name(y_bto, OUTPUT_NAME)
        if self.lora is not None and self.lora.use_dora:
            y_bto = self._rescaled(y_bto, weight_oi, a_ri, b_or)
        return y_bto + self.bias[...].astype(y_bto.dtype) if hasattr(self, "bias") else y_bto

    def kernel(self, dtype: jnp.dtype) -> jax.Array:
        """The kernel [out, in] for computation: dequantised, and gathered along fsdp."""
        if isinstance(self.weight, BaseParam):
            return gather_weight(self.weight[...].astype(dtype), *self.axes)
        return self.weight.dequantized(self.axes, dtype)

    def factors(self) -> tuple[jax.Array, jax.Array]:
        """A and scale · B in float32, so that the compute dtype does not round the scale. B itself if every row has
        scales of its own (`select_columns`), which `low` applies."""
        scale = self.lora_scale[...]
        return self.lora_a[...], self.lora_b[...] if scale.ndim == 2 else self.lora_b[...] * scale

    def low(self, x_bti: jax.Array, a_ri: jax.Array) -> jax.Array:
        """A x."""
        low_btr, scale = _by_group(x_bti, a_ri.astype(x_bti.dtype)), self.lora_scale[...]
        return low_btr * scale[:, None].astype(low_btr.dtype) if scale.ndim == 2 else low_btr

    def dropped(self, x_bti: jax.Array, row_keys_b: jax.Array | None) -> jax.Array:
        assert self.lora is not None
        if row_keys_b is None or self.lora.dropout == 0:
            return x_bti
        return dropout_rows(x_bti, fold_keys(row_keys_b, self.dropout_id), self.lora.dropout)

    def _rescaled(self, y_bto: jax.Array, weight_oi: jax.Array, a_ri: jax.Array, b_or: jax.Array) -> jax.Array:
        """DoRA (Liu et al., 2024, arXiv:2402.09353): each output times magnitude / ‖row of W + scale · B A‖.

        As in the paper's section 4.3 and in PEFT, the norm has no gradient. PEFT also applies dropout to the input of
        magnitude · W x; here it applies only to the input of B A, so that no weight is multiplied twice.
        """
        norm_o = jax.lax.stop_gradient(row_norms(weight_oi, a_ri, b_or))
        ratio_o = jnp.where(self.lora_scale[...] != 0, self.lora_magnitude[...] / norm_o, 1.0)
        ratio_go = ratio_o.reshape(-1, ratio_o.shape[-1])
        y_gbto = y_bto.reshape(ratio_go.shape[0], -1, *y_bto.shape[1:])
        return (y_gbto * ratio_go[:, None, None, :]).astype(y_bto.dtype).reshape(y_bto.shape)


class LoRAHead(LoRALinear):
    """The language-model head [vocab, model]: used as a table, because the loss never stores its whole output.

    An adapter adds columns to table and hidden states, as many as its rank, h W + (A h) (scale · B), so that no weight
    is rounded after adding the adapter to it.
    """

    token_rows: TokenRows | None = None

    def table(self, dtype: jnp.dtype) -> jax.Array:
        """The table, in which `token_rows` are not replaced."""
        assert isinstance(self.weight, BaseParam), "a head is never quantised"
        weight_vd = self.weight[...].astype(dtype)
        if self.lora is not None:
            weight_vd = jnp.concatenate([weight_vd, self.factors()[1].astype(dtype)], axis=1)
        return constrain(weight_vd, "vocab", None)

    def widen(self, hidden_btd: jax.Array, row_keys_b: jax.Array | None = None) -> jax.Array:
        """Hidden states with the width of `table`."""
        if self.lora is None:
            return hidden_btd
        low_btr = self.low(self.dropped(hidden_btd, row_keys_b), self.factors()[0])
        return jnp.concatenate([hidden_btd, low_btr], axis=-1)


def select_columns(state: nnx.State, columns_b2: jax.Array) -> nnx.State:
    """The state of a module or of one layer in which row b of a batch uses only columns `columns_b2[b]` (first, end)
    of B, and the same rows of A.

    Several adapters on one base are one adapter side by side: each has its own columns, with its scale multiplied into
    B, and a row uses those of its adapter. A row with no columns is that of the base.
    """

    def select(leaf: nnx.Variable) -> nnx.Variable:
        if not isinstance(leaf, LoRAScale):
            return leaf
        return leaf.replace(selected)

    ranks = {leaf.shape[-1] for _, leaf in nnx.to_flat_state(state) if _is_b(leaf)}
    if not ranks:
        return state
    (rank,) = ranks
    column_r = jnp.arange(rank)
    selected = ((column_r >= columns_b2[:, :1]) & (column_r < columns_b2[:, 1:])).astype(jnp.float32)
    return jax.tree.map(select, state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _is_b(leaf: nnx.Variable) -> bool:
    return isinstance(leaf, LoRAParam) and leaf.get_metadata("info").kind == "lora_b"


def row_norms(weight_oi: jax.Array, a_ri: jax.Array, b_or: jax.Array) -> jax.Array:
    """‖W + B A‖ of each row, float32 [out], or [groups, out] for adapters [groups, ...], without computing the sum.

    ‖w + b A‖² = ‖w‖² + 2 b·(A w) + b·(A Aᵀ) b. At least 1e-30, so that a row of zeros causes no division by zero.
    """
    squares_o = jnp.sum(jnp.square(weight_oi.astype(jnp.float32)), axis=-1)
    products_or = jnp.einsum(
        "oi,...ri->...or", weight_oi, a_ri.astype(weight_oi.dtype), preferred_element_type=jnp.float32
    )
    gram_rs = jnp.einsum("...ri,...si->...rs", a_ri, a_ri)
    added_o = jnp.sum(b_or * (2 * products_or + jnp.einsum("...or,...rs->...os", b_or, gram_rs)), axis=-1)
    return jnp.sqrt(jnp.maximum(squares_o + added_o, 1e-30))


def _by_group(x_bti: jax.Array, weight: jax.Array) -> jax.Array:
    """x times the transpose of `weight`, which is [out, in] for all rows, or [groups, out, in] with one matrix for each
    equal part of the batch, in order."""
    if weight.ndim == 2:
        return times_matrix(x_bti, weight)
    x_gbti = x_bti.reshape(weight.shape[0], -1, *x_bti.shape[1:])
    return jnp.einsum("gbti,goi->gbto", x_gbti, weight).reshape(*x_bti.shape[:2], -1)


def base_matrix(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """A random matrix [out, in] or table [vocab, model]: normal, with variance 1 / last dimension.

    At LLaMA's widths this equals Hugging Face's 0.02. A small model initialized with 0.02 would stay on a plateau with
    uniform attention for most of its training.
    """
    return (shape[-1] ** -0.5 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def fold_keys(keys_b: jax.Array, data: jax.Array | int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (0, None))(keys_b, data)


def dropout_rows(x_bti: jax.Array, keys_b: jax.Array, rate: float) -> jax.Array:
    """Inverted dropout with one key per row, so that it does not depend on the partition of a batch over devices or
    steps."""
    keep_bti = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x_bti.shape[1:]))(keys_b)
    return jnp.where(keep_bti, x_bti / (1 - rate), jnp.zeros((), x_bti.dtype))
