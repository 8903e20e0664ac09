"""GGUF, the file format of llama.cpp and Ollama: a model, its tokenizer and its chat template in one file."""

from types import ModuleType

from flacuna_jax.errors import UserError


def gguf_package() -> ModuleType:
    """The package `gguf`, which has the constants and quantised types. Raises `UserError` if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need the package gguf: pip install 'flacuna-jax[gguf]'") from None
    return gguf
