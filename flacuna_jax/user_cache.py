"""The directory for cached results that can be recomputed: tokenised corpora, chosen layouts, compiled programs."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def user_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """$FLACUNA_CACHE, or else flacuna_jax in the user's cache directory. A user without a home directory, such as a
    numeric user id in a container, gets a temporary directory."""
    given = environment.get("FLACUNA_CACHE")
    if given:
        return Path(given)
    try:
        return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flacuna_jax"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"flacuna_jax-{os.getuid()}"
