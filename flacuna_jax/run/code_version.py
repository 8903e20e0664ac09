"""Identifies the code of a run: hashes of the package's own sources, and versions of the libraries.

A run that is continued with different code may compute different numbers, and nothing else in its files would show it.
"""

import os
from collections.abc import Mapping
from importlib import metadata

from flacuna_jax.source_code import source_digest

PARTS = {
    "model": ("model",),
    "kernels": ("kernels",),
    "data": ("data/packing.py", "data/pipeline.py", "data/held_out.py"),
    "training": ("training",),
    "compiler": ("compiler.py", "deviceless.py"),
}
"""Files and folders that affect the numbers of a run. Tokenisation code is not included, because the tokenised data
have their own fingerprint."""

LIBRARIES = ("jax", "jaxlib", "flax", "optax")
COMPILER_SETTINGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_DEFAULT_MATMUL_PRECISION")


def code_fingerprints() -> dict[str, str]:
    """A short hash of each part of the package."""
    return {name: source_digest(*places)[:16] for name, places in PARTS.items()}


def library_versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in LIBRARIES}


def compiler_settings(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Environment variables that affect the compiler's rounding."""
    return {name: environment.get(name, "") for name in COMPILER_SETTINGS}


def package_fingerprint() -> str:
    """A hash of the whole package: hosts that train together must run the same code."""
    return source_digest(".")
