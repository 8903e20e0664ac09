"""The network of a run: sizes from a checkpoint on disk, or from the config."""

import dataclasses
from pathlib import Path

from flacuna_jax.config.data import DataConfig
from flacuna_jax.config.model import ArchitectureConfig, ModelConfig
from flacuna_jax.config.run import RunConfig
from flacuna_jax.config.types import HEAD
from flacuna_jax.errors import UserError
from flacuna_jax.huggingface.architecture import read_architecture
from flacuna_jax.huggingface.changed_base import grown, with_more_rows
from flacuna_jax.huggingface.files.read import open_checkpoint
from flacuna_jax.huggingface.files.tensors import TensorReader
from flacuna_jax.huggingface.tokenizer import NewTokens, load_tokenizer, token_id
from flacuna_jax.model.llama import LlamaConfig
from flacuna_jax.model.parameters import ModelSpec
from flacuna_jax.model.token_rows import NO_TOKENS, TrainedTokens


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Sizes, and a reader of the weight files; if the reader is None, the weights are initialised randomly."""

    config: LlamaConfig
    reader: TensorReader | None
    tokens: TrainedTokens = NO_TOKENS
    """Tokens whose rows of embedding and head are trained."""

    def spec(self, config: RunConfig) -> ModelSpec:
        return ModelSpec.of_run(self.config, config.model, config.lora, self.tokens)


def open_model(config: RunConfig, base: str | Path | None = None, *, once: bool = False) -> ModelSource:
    """Reads sizes and opens the files of a run's base without reading weights.

    Args:
      config: the config of the run.
      base: current path of the checkpoint; None for `model.path`.
      once: see `open_checkpoint`.

    Raises:
      UserError: files, sizes or tokens to train are invalid.
    """
    model = config.model
    sizes = network_sizes(model, config.data, base)
    tokens = trained_tokens(config, sizes)
    if model.architecture is not None:
        return ModelSource(sizes, None, tokens)
    directory = str(base or model.path)
    stored, reader = read_architecture(directory), open_checkpoint(directory, once=once)
    more = sizes.vocab_size > stored.vocab_size
    return ModelSource(sizes, with_more_rows(stored, sizes.vocab_size).on(reader) if more else reader, tokens)


def network_sizes(model: ModelConfig, data: DataConfig, base: str | Path | None = None) -> LlamaConfig:
    """Sizes of the network that a run trains, from its checkpoint or config, with the run's `rope_scaling` and room for
    the run's new tokens.

    Args:
      model: the model section of the run's config.
      data: its data section.
      base: current path of the checkpoint; None for `model.path`.

    Raises:
      UserError: config.json cannot be read, or is incompatible with the scaling.
    """
    if model.architecture is not None:
        sizes = architecture_sizes(model.architecture, model.tokenizer_path, data.new_tokens)
    else:
        sizes = read_architecture(str(base or model.path))
    sizes = with_rope_scaling(with_new_tokens(sizes, model, data), model, data.max_length)
    if sizes.context_length < min(data.max_length, sizes.max_position_embeddings):
        raise UserError(
            f"data.max_length {data.max_length} exceeds {sizes.context_length}, the original context of {model.path}; "
            "beyond it, LongRoPE has other frequencies (long_factor), which are not implemented"
        )
    return sizes


def with_new_tokens(sizes: LlamaConfig, model: ModelConfig, data: DataConfig) -> LlamaConfig:
    """The sizes of a checkpoint with room for a run's new tokens."""
    if not data.new_tokens:
        return sizes
    tokens = load_tokenizer(model.tokenizer_path, data.new_tokens).vocab_size
    return dataclasses.replace(sizes, vocab_size=grown(sizes.vocab_size, tokens))


def trained_tokens(config: RunConfig, sizes: LlamaConfig) -> TrainedTokens:
    """The tokens of `lora.train_tokens`, then the new ones. Raises UserError for a text that is not one token."""
    lora, new = config.lora, config.data.new_tokens
    if lora is None or not (lora.train_tokens or new):
        return NO_TOKENS
    tokenizer = load_tokenizer(config.model.tokenizer_path, new)
    ids: list[int] = []
    for token in (*lora.train_tokens, *(content for content, _ in new)):
        number = token if isinstance(token, int) else token_id(tokenizer, token)
        if number is None:
            raise UserError(
                f"lora.train_tokens: {token!r} is not one token, but {len(tokenizer.encode(str(token), first=False))}; "
                "data.add_tokens makes it one"
            )
        if number >= sizes.vocab_size:
            raise UserError(f"lora.train_tokens: {number} is not an id; the embedding has {sizes.vocab_size} rows")
        if number in ids:
            raise UserError(f"lora.train_tokens: {token!r} is named twice, or is a new token, which is always trained")
        ids.append(number)
    if HEAD in lora.targets:
        raise UserError(f"lora.targets: {HEAD} cannot have an adapter together with trained rows (train_tokens)")
    return TrainedTokens.everywhere(tuple(ids), sizes.tie_word_embeddings)


def context_warning(sizes: LlamaConfig, max_length: int) -> str | None:
    """A warning if rows are longer than the network's context; None if they fit."""
    context = sizes.context_length
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


def architecture_sizes(architecture: ArchitectureConfig, tokenizer_path: str, new: NewTokens = ()) -> LlamaConfig:
    """Sizes from a config; missing ones are derived from the others and the tokenizer."""
    return LlamaConfig(
        vocab_size=architecture.vocab_size or load_tokenizer(tokenizer_path, new).vocab_size,
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
