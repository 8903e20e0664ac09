"""Where a run's network comes from: the sizes of a checkpoint on disk, or those of the config."""

import dataclasses

from flacuna_jax.config import ArchitectureConfig, ModelConfig
from flacuna_jax.huggingface.architecture import read_architecture
from flacuna_jax.huggingface.read import open_checkpoint
from flacuna_jax.huggingface.tensors import TensorReader
from flacuna_jax.huggingface.tokenizer import load_tokenizer
from flacuna_jax.model.llama import LlamaConfig


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Sizes, and the files that hold the weights; without files the weights are drawn at random."""

    config: LlamaConfig
    reader: TensorReader | None


def open_model(model: ModelConfig) -> ModelSource:
    """Reads sizes and opens the files, no weights yet. Raises `UserError` if either is not as it should be."""
    if model.architecture is not None:
        return ModelSource(architecture_sizes(model.architecture, model.tokenizer_path), None)
    path = str(model.path)
    return ModelSource(read_architecture(path), open_checkpoint(path))


def architecture_sizes(architecture: ArchitectureConfig, tokenizer_path: str) -> LlamaConfig:
    """Sizes that a config gives itself; those it leaves out follow from the others and the tokenizer."""
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
