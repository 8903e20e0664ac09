"""Repositories of the Hugging Face Hub, hf:NAME[@REVISION], which huggingface_hub downloads into its own cache."""

import dataclasses
import errno
import functools
import glob
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

from flacuna_jax.errors import UserError

PREFIX = "hf:"
MODEL_FORM = "hf:NAME[@REVISION][:FILE]"
_PAGE = re.compile(r"(?i:(?:https?:/+)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf:/*)([\w.-]+/[\w.-]+).*")
"""Addresses of pages of the Hub, and other ways to write a name."""
_WORTH_TELLING = 1 << 30
_AGAIN = (
    "; run again, the same command transfers only the missing files. If all are in the cache, HF_HUB_OFFLINE=1 uses "
    "them without a connection"
)

Kind = Literal["model", "dataset"]
Choose = Callable[[Sequence[str]], Sequence[str]]
"""Returns those of a repository's files that are needed, given the paths of all."""


@dataclass(frozen=True)
class HubName:
    """A repository of the Hub.

    Attributes:
      name: OWNER/NAME; a few old repositories have no owner.
      revision: a branch, a tag or a commit. None: the default branch.
      file: which of the repository's GGUF files is meant.
    """

    name: str
    revision: str | None = None
    file: str | None = None

    @staticmethod
    def parse(text: str, form: str = "hf:NAME[@REVISION]") -> "HubName":
        """Parses a name with or without its prefix. Raises UserError, with the `form` that is expected."""
        name, at, revision = text.removeprefix(PREFIX).partition("@")
        if not is_repository_name(name) or bool(at) != bool(revision):
            raise UserError(f"{text!r} is not the name of a repository on the Hugging Face Hub; write {form}")
        return HubName(name, revision or None)

    @staticmethod
    def parse_model(text: str) -> "HubName":
        """Parses the name of a model, hf:NAME[@REVISION][:FILE]. Raises UserError."""
        repository, colon, file = text.removeprefix(PREFIX).partition(":")
        if bool(colon) != bool(file):
            raise UserError(f"{text!r} has no file after the colon; write {MODEL_FORM}")
        return dataclasses.replace(HubName.parse(PREFIX + repository, MODEL_FORM), file=file or None)

    def __str__(self) -> str:
        revision, file = f"@{self.revision}" if self.revision else "", f":{self.file}" if self.file else ""
        return f"{PREFIX}{self.name}{revision}{file}"


@dataclass(frozen=True)
class Snapshot:
    """Files of a repository in the cache.

    Attributes:
      directory: of its files at one commit, which is the directory's name.
      files: the chosen files, relative to the directory.
    """

    directory: Path
    files: tuple[str, ...]


def is_repository_name(text: str) -> bool:
    """Whether a text has the form OWNER/NAME or NAME, unlike most paths."""
    return re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", text) is not None


def is_hub_name(path: str | Path) -> bool:
    """Whether a path begins with hf:. Raises UserError if it is the address of a repository in another form."""
    text = str(path)
    if text.startswith(PREFIX) and not text.startswith(f"{PREFIX}/"):
        return True
    if (page := _PAGE.fullmatch(text)) and not os.path.exists(text):
        raise UserError(f"{text}: for this repository of the Hugging Face Hub, write {PREFIX}{page[1]}")
    return False


@functools.cache
def fetch(name: HubName, kind: Kind, choose: Choose) -> Snapshot:
    """Downloads those files of a repository that are not in the cache yet, once in a process.

    huggingface_hub locks each file that it downloads, so that several processes on a host download it once. If a
    connection ends, it tries again from that byte; in a later process, from the beginning of that file.

    Raises:
      UserError: huggingface_hub is not installed; the repository or the revision does not exist, is gated or cannot be
        reached; or HF_HUB_OFFLINE is set and some of the files are not in the cache.
    """
    client = import_client(str(name))
    repository = Path(client.constants.HF_HUB_CACHE) / f"{kind}s--{name.name.replace('/', '--')}"
    try:
        return _download(client, repository, name, kind, choose)
    except client.errors.OfflineModeIsEnabled:
        return _find(client, repository, name, kind, choose)
    except UserError:
        raise
    except Exception as error:
        # The client raises its own errors, those of its HTTP library and of the file system.
        raise UserError(f"{name}: {explained(client, error, name, kind, _AGAIN)}") from error


def _download(client: ModuleType, repository: Path, name: HubName, kind: Kind, choose: Choose) -> Snapshot:
    info = client.HfApi().repo_info(name.name, repo_type=kind, revision=name.revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings}
    files = tuple(choose(sorted(sizes)))
    directory = repository / "snapshots" / info.sha
    missing = [file for file in files if not (directory / file).is_file()]
    # Also without a missing file, the client has to note the commit of a branch, for use without a connection.
    if missing or _cached(repository, name.revision) != directory:
        size = sum(sizes[file] for file in missing)
        if size > _WORTH_TELLING:
            print(f"downloading {name} ({size / 1e9:.1f} GB) to {repository}", file=sys.stderr)
        # The client treats the names as patterns.
        patterns = [glob.escape(file) for file in files]
        path = client.snapshot_download(name.name, repo_type=kind, revision=name.revision, allow_patterns=patterns)
        directory = Path(path)
    return Snapshot(directory, files)


def _find(client: ModuleType, repository: Path, name: HubName, kind: Kind, choose: Choose) -> Snapshot:
    """The files in the cache. Raises UserError if some of the chosen ones are not there."""
    advice = (
        "HF_HUB_OFFLINE forbids downloading it; unset HF_HUB_OFFLINE, or download it where there is a connection: "
        f"{_command(name, kind)}"
    )
    directory = _cached(repository, name.revision)
    if directory is None:
        raise UserError(f"{name} is not in the cache of the Hub ({repository}), and {advice}")
    try:
        of_cache = client.get_cached_repo_tree(name.name, repo_type=kind, revision=directory.name)
        listed = [file.path for file in of_cache]
    except client.errors.CachedRepoTreeNotFoundError:  # another program filled the cache
        listed = [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]
    files = tuple(choose(sorted(listed)))
    missing = [file for file in files if not (directory / file).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more files are" if len(missing) > 1 else " is"
        raise UserError(f"{name}: {missing[0]}{more} not in the cache of the Hub ({directory}), and {advice}")
    return Snapshot(directory, files)


def import_client(what: str) -> ModuleType:
    """Imports huggingface_hub, without its messages. Raises UserError, which names `what` needs it."""
    try:
        import huggingface_hub  # optional
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as error:
        raise UserError(
            f"{what} needs the Hub client: pip install 'flacuna-jax[hub]' ({error}); a local copy works without it"
        ) from None
    huggingface_hub.utils.logging.set_verbosity_error()
    if not (sys.stderr and sys.stderr.isatty()):
        huggingface_hub.utils.disable_progress_bars()
    return huggingface_hub


def explained(client: ModuleType, error: Exception, name: HubName, kind: Kind, advice: str = "") -> str:
    """What an error of the client means and what to do about it; `advice` is for a transfer that failed."""
    errors, endpoint = client.errors, client.constants.ENDPOINT
    page = f"{endpoint}/{'datasets/' if kind == 'dataset' else ''}{name.name}"
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids connections; unset it"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return f"it is gated: accept its conditions at {page}, then log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"there is no revision {name.revision or 'main'} of this {kind}; {page} lists its branches and tags"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{endpoint} has no {kind} of this name, or it is private; check the name, or log in with `hf auth login` "
            "or set HF_TOKEN"
        )
    if status == 401:
        return f"{endpoint} refuses the token; log in again with `hf auth login`, or set HF_TOKEN to a valid one"
    if status == 403:
        return f"the token has no permission for it ({_on_one_line(error)}); use one with more permissions in HF_TOKEN"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        cache = client.constants.HF_HUB_CACHE
        return f"the disk of {cache} is full; free space, or set HF_HOME to a directory on another disk"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be written to ({error.strerror}); set HF_HOME to a directory that can be"
    return f"the transfer failed ({type(error).__name__}: {_on_one_line(error)}){advice}"


def _on_one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    return text if len(text) <= 300 else f"{text[:300]}..."


def _command(name: HubName, kind: Kind) -> str:
    options = (" --repo-type dataset" if kind == "dataset" else "") + (
        f" --revision {name.revision}" if name.revision else ""
    )
    return f"hf download {name.name}{options}"


def _cached(repository: Path, revision: str | None) -> Path | None:
    """The cached snapshot of a revision, given the directory of its repository in the cache; None if not cached."""
    ref = repository / "refs" / (revision or "main")
    commit = ref.read_text().strip() if ref.is_file() else revision
    directory = None if commit is None else repository / "snapshots" / commit
    return directory if directory is not None and directory.is_dir() else None


def snapshot_of(path: Path) -> Path:
    """The snapshot of a repository's directory in the cache, models--OWNER--NAME; other paths unchanged.

    Raises UserError if the directory does not have the default branch and has no or several other snapshots.
    """
    if not path.name.startswith(("models--", "datasets--")) or not (path / "snapshots").is_dir():
        return path
    if (main := _cached(path, None)) is not None:
        return main
    snapshots = sorted((path / "snapshots").iterdir())
    if len(snapshots) == 1:
        return snapshots[0]
    which = f"give one of its snapshots: {', '.join(map(str, snapshots))}" if snapshots else "download it again"
    raise UserError(f"{path}: this directory of the Hub cache has {len(snapshots)} snapshots and no main; {which}")


DELIVERED = ("adapter", "model")
"""Names of the directories in which runs deliver; they say nothing about the model."""


def name_of(directory: Path) -> str:
    """The name of a directory; for a snapshot in the cache, the repository's name without its owner; for what a run
    delivered, the run's name."""
    absolute = directory.absolute()  # "." has no name
    if absolute.name in DELIVERED and absolute.parent.name:
        return absolute.parent.name
    if absolute.parent.name == "snapshots" and "--" in absolute.parent.parent.name:
        return absolute.parent.parent.name.rpartition("--")[2]
    return absolute.name
