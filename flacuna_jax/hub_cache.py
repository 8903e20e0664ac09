"""The cache of the Hugging Face Hub client: models--OWNER--NAME/snapshots/REVISION."""

from pathlib import Path

from flacuna_jax.errors import UserError


def require_no_cache_directory(path: Path) -> None:
    """Raises UserError with the snapshot to use instead, if `path` is a repository's directory in the Hub cache."""
    if not path.name.startswith(("models--", "datasets--")) or not (path / "snapshots").is_dir():
        return
    snapshots = sorted((path / "snapshots").iterdir(), key=lambda snapshot: snapshot.stat().st_mtime)
    advice = f"give its snapshot: {snapshots[-1]}" if snapshots else "it has no snapshot: download it again"
    raise UserError(f"{path}: this is a directory of the Hub cache; {advice}")
