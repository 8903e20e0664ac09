"""Which code computes a run: hashes of the package's own sources, and versions of the libraries below them.

A run that is continued with other code may go on differently, and nothing in its files would say so.
"""

import hashlib
import os
from collections.abc import Mapping
from importlib import metadata, resources
from pathlib import Path

PARTS = {
    "model": ("model", None),
    "kernels": ("kernels", None),
    "data": ("data", ("packing.py", "pipeline.py", "held_out.py")),
    "training": ("training", ("step.py", "optimizer.py", "guard.py", "state.py")),
}
"""What decides the numbers of a run: a room, and which files of it (None: all). What tokenises the data is not there:
the data's own fingerprint tells its result."""

LIBRARIES = ("jax", "jaxlib", "flax", "optax")
COMPILER_SETTINGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_DEFAULT_MATMUL_PRECISION")


def code_fingerprints() -> dict[str, str]:
    """A short hash per part of the package."""
    return {name: _hash(room, files) for name, (room, files) in PARTS.items()}


def library_versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in LIBRARIES}


def compiler_settings(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What the environment tells the compiler, with which the same code may round in another way."""
    return {name: environment.get(name, "") for name in COMPILER_SETTINGS}


def package_fingerprint() -> str:
    """A hash of every source file: hosts that train together must run the same."""
    with resources.as_file(resources.files("flacuna_jax")) as root:
        return _digest({path.relative_to(root).as_posix(): path for path in root.rglob("*.py")})


def _hash(room: str, files: tuple[str, ...] | None) -> str:
    with resources.as_file(resources.files(f"flacuna_jax.{room}")) as directory:
        found = {path.name: path for path in directory.glob("*.py") if files is None or path.name in files}
        return _digest(found)[:16]


def _digest(files: Mapping[str, Path]) -> str:
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        digest.update(f"{name}\n{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()
