"""Settings of the sections `model` and `lora`: the network, its weights, and its adapters."""

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from flacuna_jax.config.types import (
    HEAD,
    AlphaPattern,
    Fraction,
    Layers,
    LocalPath,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    RankPattern,
    Section,
    Target,
    by_pattern,
    expand_all_linear,
)
from flacuna_jax.hub import HubName, is_hub_name


class ArchitectureConfig(Section):
    """Sizes of a LLaMA model to train from scratch (`model.init: random`)."""

    hidden_size: PositiveInt
    """Size of an embedding and of the hidden states between layers."""
    intermediate_size: PositiveInt
    """Number of feed-forward units of a layer: the outputs of gate_proj and of up_proj."""
    num_layers: PositiveInt
    """Number of layers."""
    num_heads: PositiveInt
    """Number of query heads of a layer."""
    num_kv_heads: PositiveInt | None = None
    """Number of key and value heads of a layer; null means num_heads (no grouped-query attention)."""
    head_dim: PositiveInt | None = None
    """Size of a head; null means hidden_size / num_heads."""
    vocab_size: PositiveInt | None = None
    """Number of rows of the embedding; null means the vocabulary size of the tokenizer, with the tokens that the data
    section adds."""
    max_position_embeddings: PositiveInt = 2048
    """Context length in tokens. A larger data.max_length gives a warning, and the model generates within this length
    only."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary embedding: pair i of a head rotates by rope_theta^(-2i / head_dim) radians per position."""
    rms_norm_eps: PositiveFloat = 1e-6
    """Number that is added to the mean of squares in RMSNorm."""
    tie_word_embeddings: bool = False
    """Whether the embedding is also the output head; if false, the head is a matrix of its own."""

    @model_validator(mode="after")
    def heads_divide(self) -> "ArchitectureConfig":
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if (head_dim := self.head_dim or self.hidden_size // self.num_heads) % 2:
            raise ValueError(f"head_dim {head_dim} is odd; rotary embeddings rotate pairs of dimensions")
        if self.num_heads % (self.num_kv_heads or self.num_heads):
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        return self


class RopeScalingConfig(Section):
    """Extends a model to longer inputs than it was trained with; see docs/reference/methods.md."""

    type: Literal["linear", "ntk", "llama3"]
    """linear: all frequencies are divided by the factor. ntk: rope_theta is raised, so that the lowest frequency is
    divided by the factor and the highest is kept. llama3: only low frequencies are divided by the factor, as the last
    two settings say."""
    factor: Annotated[float, Field(gt=1)] | None = None
    """Ratio of the extended context length to the model's own; null means data.max_length / the model's own."""
    low_freq_factor: PositiveFloat = 1.0
    """llama3: wavelengths above (the model's own context length / this value) are scaled by the whole factor."""
    high_freq_factor: PositiveFloat = 4.0
    """llama3: wavelengths below (the model's own context length / this value) are not scaled."""

    @model_validator(mode="after")
    def factors_in_order(self) -> "RopeScalingConfig":
        if self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"low_freq_factor {self.low_freq_factor:g} is not below high_freq_factor {self.high_freq_factor:g}"
            )
        return self


class ModelConfig(Section):
    path: LocalPath | None = None
    """Directory of a Hugging Face LLaMA checkpoint, or of one written by `flacuna convert`; a GGUF file; or
    hf:NAME[@REVISION][:FILE], a model of the Hugging Face Hub or one of its GGUF files, which is downloaded into the
    Hub's cache. null is valid with init: random only."""
    name: str | None = None
    """Name of the base model to write into adapters, for example lmsys/vicuna-13b-v1.1; defaults to the name on the
    Hub, or to `path` as given."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute dtype, and the dtype of a frozen base. Norm statistics, softmax, loss and adapters are always float32.
    auto: bfloat16 on GPUs and TPUs; on CPUs the one that the processor multiplies faster, which the start of the run
    prints and a resumed run keeps."""
    init: Literal["pretrained", "random"] = "pretrained"
    """pretrained: the weights in `path`. random: new weights for the sizes in `architecture`, drawn with `seed`."""
    architecture: ArchitectureConfig | None = None
    """Sizes of the model for init: random; null with init: pretrained, where the checkpoint has them."""
    quantization: Literal["nf4", "int8", "int8_product", "fp8_product"] | None = None
    """How the projections of a frozen base are stored; null stores them in `dtype`. See docs/reference/methods.md. With
    the _product forms, the matrix products with activations and gradients are also computed in 8 bits, which some
    devices do faster (docs/results/laboratory.md)."""
    rope_scaling: RopeScalingConfig | None = None
    """For inputs longer than the model's context; null uses the rotary embedding of the checkpoint unchanged."""
    tokenizer: LocalPath | None = None
    """Directory with tokenizer.model or tokenizer.json, or hf:NAME[@REVISION]; defaults to `path`."""

    @model_validator(mode="after")
    def source_of_weights(self) -> "ModelConfig":
        if self.init == "pretrained" and self.path is None:
            raise ValueError("path is missing: a checkpoint directory (or init: random with an architecture)")
        if self.init == "pretrained" and self.architecture is not None:
            raise ValueError("architecture needs init: random; a pretrained checkpoint has its own")
        if self.init == "random" and (self.architecture is None or (self.tokenizer or self.path) is None):
            raise ValueError("init: random needs architecture and tokenizer")
        return self

    @property
    def tokenizer_path(self) -> str:
        path = self.tokenizer or self.path
        assert path is not None, "the validator requires one of them"
        return path

    @property
    def base_name(self) -> str | None:
        """The name of the base model in adapters and model cards; None if there is no base."""
        on_hub = self._on_hub
        return self.name or (self.path if on_hub is None else on_hub.name)

    @property
    def base_revision(self) -> str | None:
        """The revision of the model on the Hub that `base_name` names, if `path` has one."""
        on_hub = self._on_hub
        return on_hub.revision if on_hub is not None and self.base_name == on_hub.name else None

    @property
    def _on_hub(self) -> HubName | None:
        return HubName.parse_model(self.path) if self.path is not None and is_hub_name(self.path) else None


class LoraConfig(Section):
    """LoRA (Hu et al., 2021): y = W x + alpha/rank · B A dropout(x). The defaults are the paper's values."""

    rank: PositiveInt = 8
    """Rank of B A, the number of rows of A and of columns of B; r in PEFT."""
    alpha: PositiveFloat = 16.0
    """Numerator of the factor alpha/rank that multiplies B A; lora_alpha in PEFT."""
    dropout: Fraction = 0.05
    """Probability with which each element of an adapter's input is set to zero in training."""
    targets: Annotated[tuple[Target, ...], BeforeValidator(expand_all_linear), Field(min_length=1)] = (
        "q_proj",
        "v_proj",
    )
    """Modules that get adapters: any of the seven projections of a layer (all-linear selects all seven), and the output
    head, lm_head."""
    layers_to_transform: Layers | None = None
    """Indices of the layers that get adapters, from 0; null selects all layers."""
    rank_pattern: RankPattern = ()
    """Ranks of single modules. Each key is a regular expression that matches the end of a module's name, such as
    model.layers.3.self_attn.q_proj."""
    alpha_pattern: AlphaPattern = ()
    """Alphas of single modules, with the same keys as `rank_pattern`."""
    use_rslora: bool = False
    """Scale adapters by alpha/√rank instead of alpha/rank (Kalajdzievski, 2023)."""
    use_dora: bool = False
    """DoRA (Liu et al., 2024): train the norm of each row of W + B A separately from its direction."""
    train_tokens: tuple[str | NonNegativeInt, ...] = ()
    """Tokens, as text or as ids, whose rows of the embedding and of the head are trained too (PEFT's
    `trainable_token_indices`). Those that the data section adds are always trained."""
    init_from: LocalPath | None = None
    """PEFT adapter to initialize the adapters from, a directory or hf:NAME[@REVISION]; its settings must equal these.
    null starts with new adapters."""

    @model_validator(mode="after")
    def targets_fit_together(self) -> "LoraConfig":
        if len(set(self.targets)) != len(self.targets):
            raise ValueError(f"targets names a projection twice: {list(self.targets)}")
        if self.layers_to_transform is not None and HEAD in self.targets:
            raise ValueError(f"layers_to_transform selects layers, but {HEAD} in targets is in no layer")
        if self.use_dora and HEAD in self.targets:
            raise ValueError(f"use_dora applies to projections only; remove {HEAD} from targets")
        return self

    def rank_of(self, module: str) -> int:
        """Rank of a module by its Hugging Face name, for example model.layers.0.self_attn.q_proj."""
        return by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """The factor that multiplies B A in the module of that name."""
        rank = self.rank_of(module)
        return by_pattern(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.use_rslora else rank)
