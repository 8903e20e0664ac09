"""Flacuna in JAX: LoRA instruction tuning of LLaMA-family models (Ghosal et al., 2023, arXiv:2307.02053)."""

from flacuna_jax.version import __version__

__all__ = ["__version__"]
