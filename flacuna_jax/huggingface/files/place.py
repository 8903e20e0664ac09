"""The local directory of a checkpoint, an adapter or a tokenizer: a path, a GGUF file, or a name on the Hub
(hf:NAME[@REVISION])."""

import re
from collections.abc import Sequence
from pathlib import Path

from flacuna_jax.errors import UserError
from flacuna_jax.hub import HubName, fetch, is_hub_name, snapshot_of
from flacuna_jax.huggingface.gguf.header import SUFFIX, gguf_in

LOCAL = (".", "..", "checkpoints", "models", "runs")
"""Common names of local directories, which are not owners on the Hub."""

_SETTINGS = re.compile(r"[^/]+\.(json|jinja|model|txt)|additional_chat_templates/[^/]+\.jinja")
"""Configuration, tokenizer, templates and golden prompts. All of them together are small."""
_SHARD = r"(-\d+)?(-of-\d+)?"
_WEIGHTS = (
    (re.compile(rf"model{_SHARD}\.safetensors"), re.compile(rf"pytorch_model{_SHARD}\.bin")),
    (re.compile(r"adapter_model\.safetensors"), re.compile(r"adapter_model\.bin")),
)
"""Safetensors, and the older form, which is used if there are none. Repositories contain more, for example the weights
in the forms of other libraries."""


def local_checkpoint(path: str | Path, *, weights: bool = True) -> Path:
    """The directory of a checkpoint, an adapter or a tokenizer. A name on the Hub is downloaded, unless it is cached.

    Args:
      path: hf:NAME[@REVISION]; a repository's directory in the cache of the Hub, models--OWNER--NAME, which stands
        for its snapshot; a GGUF file, or a directory with one and without config.json, which is unpacked; or any other
        path, which is returned unchanged and need not exist.
      weights: whether the weights are needed. If not, only configuration, tokenizer and templates are downloaded.

    Raises:
      UserError: the repository cannot be downloaded, or it has no weights; or the GGUF file cannot be read.
    """
    if not is_hub_name(path):
        directory = snapshot_of(Path(path))
        file = gguf_in(directory)
        return directory if file is None else _unpacked(file)
    name = HubName.parse(str(path))
    snapshot = fetch(name, "model", _everything if weights else _settings)
    if weights and not _weights(snapshot.files):
        raise UserError(f"{name} has no weights of a model or an adapter (.safetensors, .bin): {snapshot.directory}")
    return snapshot.directory


def _unpacked(file: Path) -> Path:
    from flacuna_jax.huggingface.gguf.unpack import unpacked  # imports this module

    return unpacked(file)


def _settings(files: Sequence[str]) -> list[str]:
    return [file for file in files if _SETTINGS.fullmatch(file)]


def _weights(files: Sequence[str]) -> list[str]:
    chosen = []
    for safe, legacy in _WEIGHTS:
        found = [file for file in files if safe.fullmatch(file)]
        chosen += found or [file for file in files if legacy.fullmatch(file)]
    return chosen


def _everything(files: Sequence[str]) -> list[str]:
    return [*_settings(files), *_weights(files)]


def require_directory(path: str | Path, *, weights: bool = True) -> Path:
    """`local_checkpoint`. Raises `UserError` if it is not a directory; if it looks like a name on the Hub, the message
    has the way to write that."""
    directory = local_checkpoint(path, weights=weights)
    if directory.is_dir():
        return directory
    if directory.suffix == SUFFIX:
        raise UserError(f"{path} does not exist")
    hint = ""
    if not directory.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        first, _ = str(path).split("/")
        of_hub = first not in LOCAL and not Path(first).is_dir()
        hint = f"; for a model of the Hugging Face Hub, write hf:{path if of_hub else 'NAME'}"
    raise UserError(f"{path} is not a directory; give a checkpoint directory{hint}")
