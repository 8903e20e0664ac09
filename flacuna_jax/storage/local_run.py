"""Local access to a run: its directory, or a copy of a run in a bucket."""

import os
import shutil
import sys
from pathlib import Path

from etils import epath

from flacuna_jax.errors import UserError
from flacuna_jax.hub import is_hub_name
from flacuna_jax.storage.bucket import bucket_path, is_bucket, require_supported, talking_to
from flacuna_jax.user_cache import user_cache
from flacuna_jax.whole_files import replacing

_DELIVERED = ("adapter", "model")
_COPIED = ("config.yaml", "metrics.jsonl", "evaluation", *_DELIVERED)
_WORTH_TELLING = 1 << 30


def local_run(run: str) -> Path:
    """A run, or the `adapter` or `model` of a run, as a directory on this machine.

    A run in a bucket is copied to the user's cache, without its checkpoints; later calls copy only changed files.

    Raises:
      UserError: there is no run in the bucket, or it does not answer.
    """
    if is_hub_name(run) or not is_bucket(run):
        return Path(run)
    parent, _, product = run.rstrip("/").rpartition("/")
    if product in _DELIVERED:
        return local_run(parent) / product  # the settings of the run name its base
    require_supported(run)
    source, target = bucket_path(run), user_cache() / "copies" / run.replace("://", "/").rstrip("/")
    with talking_to(run):
        if not (source / "config.yaml").exists():
            raise UserError(
                f"{run} has no run (config.yaml); copy other files first, for example with gcloud storage cp"
            )
        for name in _COPIED:
            _copy(source / name, target / name)
    return target


def _copy(source: epath.Path, target: Path) -> None:
    """Makes a file or a directory what it is in the bucket; a reader of the copy sees each file whole."""
    try:
        found = source.stat()
    except FileNotFoundError:
        _remove(target)
        return
    if found.is_directory:
        names = {inner.name for inner in source.iterdir()}
        for name in names:
            _copy(source / name, target / name)
        for inner in target.iterdir() if target.is_dir() else ():
            if inner.name not in names:
                _remove(inner)
    elif not target.is_file() or (target.stat().st_size, int(target.stat().st_mtime)) != (found.length, found.mtime):
        if found.length > _WORTH_TELLING:
            print(f"copying {source} ({found.length / 1e9:.1f} GB) to {target}", file=sys.stderr)
        with replacing(target) as partial:
            with source.open("rb") as remote, partial.open("wb") as copy:
                shutil.copyfileobj(remote, copy, 8 << 20)
            os.utime(partial, (found.mtime, found.mtime))


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
