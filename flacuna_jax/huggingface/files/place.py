"""The local directory of a checkpoint, an adapter or a tokenizer: a path, a GGUF file, or a name on the Hub
(hf:NAME[@REVISION], and for one of several GGUF files hf:NAME[@REVISION]:FILE)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from flacuna_jax.errors import UserError
from flacuna_jax.hub import HubName, fetch, is_hub_name, snapshot_of
from flacuna_jax.huggingface.gguf.header import SUFFIX, gguf_in, without_part

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
      path: hf:NAME[@REVISION][:FILE]; a repository's directory in the cache of the Hub, models--OWNER--NAME, which
        stands for its snapshot; a GGUF file, or a directory with one and without config.json, which is unpacked; or any
        other path, which is returned unchanged and need not exist.
      weights: whether the weights are needed. If not, only configuration, tokenizer and templates are downloaded, which
        in a GGUF file are together with the weights.

    Raises:
      UserError: the repository cannot be downloaded, has no weights, or several GGUF files; or the GGUF file cannot be
        read.
    """
    if not is_hub_name(path):
        directory = snapshot_of(Path(path))
        file = gguf_in(directory)
        return directory if file is None else _unpacked(file)
    name = HubName.parse_model(str(path))
    snapshot = fetch(name, "model", _Needed(name, weights))
    if gguf := next((file for file in snapshot.files if file.endswith(SUFFIX)), None):
        return _unpacked(snapshot.directory / gguf)
    if weights and not _weights(snapshot.files):
        raise UserError(
            f"{name} has no weights of a model or an adapter (.safetensors, .bin, {SUFFIX}): {snapshot.directory}"
        )
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


@dataclass(frozen=True)
class _Needed:
    """Chooses the files of a repository that are needed; see `local_checkpoint`."""

    name: HubName
    weights: bool

    def __call__(self, files: Sequence[str]) -> list[str]:
        weights = [] if self.name.file else _weights(files)
        if weights:
            return [*_settings(files), *(weights if self.weights else ())]
        return [*_settings(files), *_of_gguf(self.name, [file for file in files if file.endswith(SUFFIX)])]


def _of_gguf(name: HubName, files: Sequence[str]) -> list[str]:
    """The GGUF file that a name means, or all parts of it; none if the repository has none.

    Raises:
      UserError: it is not clear which file is meant, or there is no such file.
    """
    wanted = [file for file in files if name.file is None or _is_named(file, name.file)]
    wholes = {without_part(file) for file in wanted}
    if name.file and not files:
        raise UserError(f"{name}: the repository has no GGUF files; write {HubName(name.name, name.revision)}")
    if len(wholes) > 1 or (name.file and not wholes):
        which = f"{len(wholes)} GGUF files that may be meant" if wholes else f"no GGUF file {name.file}"
        form = f"{HubName(name.name, name.revision)}:FILE"
        raise UserError(f"{name}: the repository has {which}; write {form} with one of: {', '.join(files)}")
    return wanted


def _is_named(file: str, given: str) -> bool:
    """Whether a file has a name, or in it the name of a quantised type, as in SmolLM2-135M-Q4_K_M.gguf."""
    stem = PurePosixPath(without_part(file)).stem.lower()
    return given in (file, without_part(file)) or stem.endswith((f"-{given.lower()}", f".{given.lower()}"))


def require_directory(path: str | Path, *, weights: bool = True) -> Path:
    """`local_checkpoint`. Raises `UserError` if it is not a directory; if it looks like a name on the Hub, the message
    has the way to write that."""
    directory = local_checkpoint(path, weights=weights)
    if directory.is_dir():
        return directory
    if directory.suffix == SUFFIX and not directory.exists():
        raise UserError(f"{path} does not exist")
    raise UserError(f"{path} is not a directory; give a checkpoint directory{hub_hint(path)}")


def hub_hint(path: str | Path) -> str:
    """The end of a message about a directory that does not exist, if the path looks like a name on the Hub."""
    if Path(path).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        return ""
    first, _ = str(path).split("/")
    of_hub = first not in LOCAL and not Path(first).is_dir()
    return f"; for one of the Hugging Face Hub, write hf:{path if of_hub else 'NAME'}"
