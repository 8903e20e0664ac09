"""LLaMA (Touvron et al., 2023, arXiv:2302.13971) and its family: block and model.

Parameters keep Hugging Face's layout ([out, in] kernels, rotate-half rotary pairs), so nothing is transposed or
permuted on reading or writing. The blocks are stacked along a leading `layers` axis and scanned, so compile time does
not grow with depth. Shape suffixes: b batch, t length, d model, h heads, k key/value heads, n head_dim, f feed-forward.

Each module has its Hugging Face name and its logical axes here; modules are listed nowhere else. They are declared in
the order in which a forward pass uses them, which is also their order in written files.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from flacuna_jax.config.model import LoraConfig
from flacuna_jax.kernels.attention import Backend, attention
from flacuna_jax.kernels.packed_mask import PackedMask
from flacuna_jax.kernels.products import times_matrix
from flacuna_jax.kernels.softcap import capped
from flacuna_jax.model.lora import LoRAHead, LoRALinear, base_matrix, fold_keys
from flacuna_jax.model.quantized import Quantization
from flacuna_jax.model.remat import REMAT_POLICIES
from flacuna_jax.model.rope import Rope
from flacuna_jax.model.sharding import constrain
from flacuna_jax.model.sizes import Family, LlamaConfig
from flacuna_jax.model.token_rows import NO_TOKENS, TokenRows, TrainedTokens
from flacuna_jax.model.variables import Axes, BaseParam, ModuleName, ParamInfo, Rows

__all__ = ["Block", "Embedding", "Family", "Llama", "LlamaConfig", "RMSNorm"]

EMBEDDING, HEAD = ModuleName("model.embed_tokens"), ModuleName("lm_head")
BFLOAT16 = jnp.dtype(jnp.bfloat16)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": jax.nn.gelu,
}


class RMSNorm(nnx.Module):
    """x / rms(x) · (offset + weight), with statistics in float32 for any dtype of x (Zhang & Sennrich, 2019)."""

    def __init__(self, name: ModuleName, size: int, config: LlamaConfig, param_dtype: jnp.dtype) -> None:
        self.eps, self.offset = config.rms_norm_eps, config.norm_offset
        ones = jnp.full((size,), 1 - self.offset, param_dtype)
        self.weight = BaseParam(ones, info=ParamInfo(name, "weight", "norm", (None,)))

    def __call__(self, x_btd: jax.Array) -> jax.Array:
        x32 = x_btd.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        if self.offset:
            return (normed * (self.offset + self.weight[...].astype(jnp.float32))).astype(x_btd.dtype)
        return normed.astype(x_btd.dtype) * self.weight[...].astype(x_btd.dtype)


class Embedding(nnx.Module):
    """The table [vocab, model], which is also the language-model head if the two are tied."""

    token_rows: TokenRows | None = None

    def __init__(self, name: ModuleName, vocab_size: int, size: int, param_dtype: jnp.dtype, rngs: nnx.Rngs) -> None:
        table_vd = base_matrix(rngs.params(), (vocab_size, size), param_dtype)
        self.weight = BaseParam(table_vd, info=ParamInfo(name, "weight", "table", ("vocab", None)))

    def __call__(self, tokens_bt: jax.Array, dtype: jnp.dtype) -> jax.Array:
        x_btd = jnp.take(self.table(dtype), tokens_bt, axis=0)
        return x_btd if self.token_rows is None else self.token_rows.in_lookup(x_btd, tokens_bt)

    def table(self, dtype: jnp.dtype) -> jax.Array:
        """The table, in which `token_rows` are not replaced."""
        # Not `gather_weight`: it is best to sum the gradient of lookups locally, and scatter it as one table.
        return constrain(self.weight[...].astype(dtype), "vocab", None)


class Block(nnx.Module):
    """One decoder layer. The caller provides attention to keys and values: within packed rows in training, to a cache
    in decoding."""

    def __init__(
        self,
        config: LlamaConfig,
        lora: LoraConfig | None,
        param_dtype: jnp.dtype,
        rngs: nnx.Rngs,
        layer: jax.Array | int = 0,
        quantization: Quantization | None = None,
    ) -> None:
        self.config = config
        d, f = config.hidden_size, config.intermediate_size
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        block = ModuleName("model.layers.{}", config.num_layers)

        def norm(name: str, size: int) -> RMSNorm:
            return RMSNorm(block.inside(name), size, config, param_dtype)

        def project(
            name: str, into: int, out: int, axes: Axes, dropout_id: int, rows: Rows | None = None
        ) -> LoRALinear:
            return LoRALinear(
                block.inside(name),
                into,
                out,
                axes=axes,
                lora=lora,
                layer=layer,
                rows=rows,
                bias=block.inside(name).last in config.biases,
                quantization=quantization,
                dropout_id=dropout_id,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        def within(name: str, first: int, total: int) -> Rows | None:
            return Rows(block.inside(name), first, total) if config.fused_projections else None

        qkv, gate_up = "self_attn.qkv_proj", "mlp.gate_up_proj"
        # The numbers distinguish the dropout keys of the projections; changing a number changes its random stream.
        if config.norms != "after":
            self.input_layernorm = norm("input_layernorm", d)
        self.q_proj = project("self_attn.q_proj", d, q, ("heads", None), 0, within(qkv, 0, q + 2 * kv))
        if config.qk_norm is not None:
            self.q_norm = norm("self_attn.q_norm", config.head_dim if config.qk_norm == "head" else q)
        self.k_proj = project("self_attn.k_proj", d, kv, ("kv_heads", None), 1, within(qkv, q, q + 2 * kv))
        if config.qk_norm is not None:
            self.k_norm = norm("self_attn.k_norm", config.head_dim if config.qk_norm == "head" else kv)
        self.v_proj = project("self_attn.v_proj", d, kv, ("kv_heads", None), 2, within(qkv, q + kv, q + 2 * kv))
        self.o_proj = project("self_attn.o_proj", q, d, (None, "heads"), 3)
        # In the family's names, the norm before the feed-forward is "post attention", unless there is also one that
        # normalises the output of attention.
        self.post_attention_layernorm = norm("post_attention_layernorm", d)
        if config.norms == "around":
            self.pre_feedforward_layernorm = norm("pre_feedforward_layernorm", d)
        self.gate_proj = project("mlp.gate_proj", d, f, ("ffn", None), 4, within(gate_up, 0, 2 * f))
        self.up_proj = project("mlp.up_proj", d, f, ("ffn", None), 5, within(gate_up, f, 2 * f))
        self.down_proj = project("mlp.down_proj", f, d, (None, "ffn"), 6)
        if config.norms != "before":
            self.post_feedforward_layernorm = norm("post_feedforward_layernorm", d)

    def __call__(
        self,
        x_btd: jax.Array,
        rope: Rope,
        attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
        row_keys_b: jax.Array | None = None,
    ) -> jax.Array:
        """Args:
        x_btd: activations.
        rope: the rotary embedding for the positions of x.
        attend: (q_bthn, k_btkn, v_btkn) → o_bthn.
        row_keys_b: dropout keys, one per row; None evaluates.
        """
        config, norms = self.config, self.config.norms
        h_btd = x_btd if norms == "after" else self.input_layernorm(x_btd)
        q_bthn, k_btkn, v_btkn = self._queries_keys_values(h_btd, row_keys_b)
        o_bthn = attend(rope.rotate(q_bthn), rope.rotate(k_btkn), v_btkn)
        o_btd = self.o_proj(o_bthn.reshape(*o_bthn.shape[:2], -1), row_keys_b)
        if norms != "before":
            o_btd = self.post_attention_layernorm(o_btd)
        x_btd = constrain(x_btd + _scaled(o_btd, config.residual_multiplier), "batch", None, None)

        h_btd = x_btd
        if norms != "after":
            h_btd = (self.post_attention_layernorm if norms == "before" else self.pre_feedforward_layernorm)(x_btd)
        gate_btf = ACTIVATIONS[config.activation](self.gate_proj(h_btd, row_keys_b))
        h_btf = constrain(gate_btf * self.up_proj(h_btd, row_keys_b), "batch", None, "ffn")
        o_btd = self.down_proj(h_btf, row_keys_b)
        if norms != "before":
            o_btd = self.post_feedforward_layernorm(o_btd)
        return constrain(x_btd + _scaled(o_btd, config.residual_multiplier), "batch", None, None)

    def _queries_keys_values(
        self, h_btd: jax.Array, row_keys_b: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        n, qk_norm = self.config.head_dim, self.config.qk_norm
        q_bto = self.q_proj(h_btd, row_keys_b)
        q_bthn = _split_heads(self.q_norm(q_bto) if qk_norm == "all" else q_bto, n, "heads")
        q_bthn = self.q_norm(q_bthn) if qk_norm == "head" else q_bthn
        k_bto = self.k_proj(h_btd, row_keys_b)
        k_btkn = _split_heads(self.k_norm(k_bto) if qk_norm == "all" else k_bto, n, "kv_heads")
        k_btkn = self.k_norm(k_btkn) if qk_norm == "head" else k_btkn
        return q_bthn, k_btkn, _split_heads(self.v_proj(h_btd, row_keys_b), n, "kv_heads")


def _scaled(x: jax.Array, factor: float) -> jax.Array:
    return x if factor == 1 else x * factor


def _split_heads(x_bti: jax.Array, head_dim: int, axis: str) -> jax.Array:
    return constrain(x_bti.reshape(*x_bti.shape[:2], -1, head_dim), "batch", None, axis, None)


class Llama(nnx.Module):
    """The decoder, from token ids to final hidden states; `head` gives the table that converts those to logits.

    Args:
      config: sizes.
      lora: settings of adapters, or None.
      dtype: compute dtype.
      param_dtype: dtype of base weights (adapters are float32).
      quantization: quantised form of the layers' projections, or None.
      tokens: tokens whose rows of embedding and head are trained.
    """

    def __init__(
        self,
        config: LlamaConfig,
        lora: LoraConfig | None = None,
        *,
        dtype: jnp.dtype = BFLOAT16,
        param_dtype: jnp.dtype = BFLOAT16,
        quantization: Quantization | None = None,
        tokens: TrainedTokens = NO_TOKENS,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.dtype = config, dtype
        self.embed_tokens = Embedding(EMBEDDING, config.vocab_size, config.hidden_size, param_dtype, rngs)
        if tokens.embedding:
            self.embed_tokens.token_rows = TokenRows(EMBEDDING, self.embed_tokens.table(param_dtype), tokens.embedding)
        make_blocks = nnx.vmap(lambda rngs, layer: Block(config, lora, param_dtype, rngs, layer, quantization))
        self.layers = make_blocks(rngs.split(config.num_layers), jnp.arange(config.num_layers))
        self.norm = RMSNorm(ModuleName("model.norm"), config.hidden_size, config, param_dtype)
        if not config.tie_word_embeddings:
            self.lm_head = LoRAHead(
                HEAD,
                config.hidden_size,
                config.vocab_size,
                axes=("vocab", None),
                lora=lora,
                dropout_id=7,
                param_dtype=param_dtype,
                rngs=rngs,
            )
            if tokens.head:
                self.lm_head.token_rows = TokenRows(HEAD, self.lm_head.table(param_dtype), tokens.head)

    def __call__(
        self,
        tokens_bt: jax.Array,
        positions_bt: jax.Array,
        mask: PackedMask,
        *,
        row_keys_b: jax.Array | None = None,
        remat: str = "none",
        attention_backend: Backend = "auto",
    ) -> jax.Array:
        """Hidden states after the final norm, [batch, length, model] in the compute dtype.

        Args:
          tokens_bt: int32 ids; padding may be any valid id.
          positions_bt: int32, restarting at 0 with each document.
          mask: of whole documents; layers with a window apply it to this mask.
          row_keys_b: adapter-dropout keys, one per row; None evaluates.
          remat: a key of REMAT_POLICIES.
          attention_backend: see `kernels.attention`.
        """
        config = self.config
        ropes, masks = config.ropes_at(positions_bt), config.masks(mask)
        block_graph, block_state = nnx.split(self.layers)

        def apply_block(x_btd: jax.Array, layer: tuple[jax.Array, nnx.State]) -> tuple[jax.Array, None]:
            index, state = layer
            keys_b = None if row_keys_b is None else fold_keys(row_keys_b, index)
            attend = functools.partial(
                attention,
                mask=config.in_layer(index, *masks),
                scale=config.attention_scale,
                softcap=config.attention_softcap,
                backend=attention_backend,
            )
            return nnx.merge(block_graph, state)(x_btd, config.rope_in(index, ropes), attend, keys_b), None

        apply_block = jax.checkpoint(apply_block, policy=REMAT_POLICIES[remat], prevent_cse=False)
        x_btd, _ = jax.lax.scan(apply_block, self.embed(tokens_bt), (jnp.arange(config.num_layers), block_state))
        return self.final(x_btd)

    def final(self, x_btd: jax.Array) -> jax.Array:
        """The hidden states that the head is applied to, from the last layer's."""
        return _scaled(self.norm(x_btd), 1 / self.config.logits_scaling)

    def embed(self, tokens_bt: jax.Array) -> jax.Array:
        x_btd = self.embed_tokens(tokens_bt, self.dtype)
        return constrain(_scaled(x_btd, self.config.embedding_multiplier), "batch", None, None)

    def head(self) -> jax.Array:
        """The language-model head [vocab, model] in the compute dtype; an adapter adds columns, as many as its rank.

        Logits are its product with `before_head` of the hidden states, capped by `logits_softcap`.
        """
        table_vd, rows = self._head.table(self.dtype), self.head_rows
        return table_vd if rows is None else rows.in_table(table_vd)

    @property
    def head_rows(self) -> TokenRows | None:
        """Trained rows of the head."""
        return self._head.token_rows

    @property
    def _head(self) -> Embedding | LoRAHead:
        return self.embed_tokens if self.config.tie_word_embeddings else self.lm_head

    def before_head(self, hidden_btd: jax.Array, row_keys_b: jax.Array | None = None) -> jax.Array:
        """Hidden states with the width of the head; `row_keys_b` as in a call."""
        return hidden_btd if self.config.tie_word_embeddings else self.lm_head.widen(hidden_btd, row_keys_b)

    def logits(self, hidden_btd: jax.Array) -> jax.Array:
        """Float32 logits [batch, length, vocab], for decoding and tests; training never stores all of them."""
        wide_btd, table_vd = self.before_head(hidden_btd), self._head.table(self.dtype)
        logits_btv = times_matrix(wide_btd, table_vd, jnp.float32)
        if self.head_rows is not None:
            logits_btv = self.head_rows.in_logits(logits_btv, hidden_btd)
        return capped(logits_btv, self.config.logits_softcap)
