"""The cache of the Hugging Face hub's client: models--OWNER--NAME/snapshots/REVISION."""

from pathlib import Path

from flacuna_jax.errors import UserError


def require_no_cache_directory(path: Path) -> None:
    """Raises UserError, which names the snapshot to take, if `path` is a repository's directory in the hub's cache."""
    if not path.name.startswith(("models--", "datasets--")) or not (path / "snapshots").is_dir():
        return
    snapshots = sorted((path / "snapshots").iterdir(), key=lambda snapshot: snapshot.stat().st_mtime)
    advice = f"name the snapshot in it: {snapshots[-1]}" if snapshots else "it holds no snapshot: download it again"
    raise UserError(f"{path}: this is a directory of the hub's cache; {advice}")
