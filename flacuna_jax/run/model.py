"""The network of a run: sizes from a checkpoint on disk, or from the config."""

import dataclasses
from pathlib import Path

from flacuna_jax.config.schema import ArchitectureConfig, ModelConfig
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.architecture import read_architecture
from flacuna_jax.huggingface.files.read import open_checkpoint
from flacuna_jax.huggingface.files.tensors import TensorReader
from flacuna_jax.huggingface.tokenizer import load_tokenizer
from flacuna_jax.model.llama import LlamaConfig


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Sizes, and a reader of the weight files; if the reader is None, the weights are initialised randomly."""

    config: LlamaConfig
    reader: TensorReader | None


def open_model(model: ModelConfig, max_length: int) -> ModelSource:
    """Reads sizes and opens the files without reading weights. Raises `UserError` if either is invalid."""
    reader = None if model.architecture is not None else open_checkpoint(str(model.path))
    return ModelSource(network_sizes(model, max_length), reader)


def network_sizes(model: ModelConfig, max_length: int, base: str | Path | None = None) -> LlamaConfig:
    """Sizes of the network that a run trains, from its checkpoint or config, with the run's `rope_scaling`.

    Args:
      model: the model section of the run's config.
      max_length: length of the run's rows in tokens.
      base: current path of the checkpoint; None for `model.path`.

    Raises:
      UserError: config.json cannot be read, or is incompatible with the scaling.
    """
    if model.architecture is not None:
        sizes = architecture_sizes(model.architecture, model.tokenizer_path)
    else:
        sizes = read_architecture(str(base or model.path))
    return with_rope_scaling(sizes, model, max_length)


def context_warning(sizes: LlamaConfig, max_length: int) -> str | None:
    """A warning if rows are longer than the network's context; None if they fit."""
    context = sizes.max_position_embeddings
    if max_length <= context:
        return None
    return f"data.max_length {max_length} exceeds the model's context of {context}; model.rope_scaling stretches it"


def with_rope_scaling(sizes: LlamaConfig, model: ModelConfig, max_length: int) -> LlamaConfig:
    """The sizes of a checkpoint with a run's `model.rope_scaling`. Raises `UserError` if they are incompatible."""
    scaling = model.rope_scaling
    if scaling is None:
        return sizes
    if sizes.rope_scaling is not None:
        raise UserError(
            f"model.rope_scaling: {model.path} scales its positions already ({sizes.rope_scaling.kind}, factor "
            f"{sizes.rope_scaling.factor:g}); leave model.rope_scaling out"
        )
    factor = scaling.factor or max_length / sizes.max_position_embeddings
    if factor <= 1:
        raise UserError(
            f"model.rope_scaling: data.max_length {max_length} is within the model's own context of "
            f"{sizes.max_position_embeddings}; leave model.rope_scaling out, or give its factor"
        )
    if factor * sizes.max_position_embeddings >= 2**31:
        raise UserError(f"model.rope_scaling.factor {factor:g}: positions must fit in 32 bits; choose a smaller factor")
    if scaling.type == "ntk" and sizes.head_dim == 2:
        raise UserError("model.rope_scaling: {type: ntk} needs at least two frequencies; heads of size 2 have only one")
    llama3 = {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    return sizes.stretched(scaling.type, factor, **(llama3 if scaling.type == "llama3" else {}))


def architecture_sizes(architecture: ArchitectureConfig, tokenizer_path: str) -> LlamaConfig:
    """Sizes from a config; missing ones are derived from the others and the tokenizer."""
    return LlamaConfig(
        vocab_size=architecture.vocab_size or load_tokenizer(tokenizer_path).vocab_size,
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.intermediate_size,
        num_layers=architecture.num_layers,
        num_heads=architecture.num_heads,
        num_kv_heads=architecture.num_kv_heads or architecture.num_heads,
        head_dim=architecture.head_dim or architecture.hidden_size // architecture.num_heads,
        rope_theta=architecture.rope_theta,
        rms_norm_eps=architecture.rms_norm_eps,
        max_position_embeddings=architecture.max_position_embeddings,
        tie_word_embeddings=architecture.tie_word_embeddings,
    )
