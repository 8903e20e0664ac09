"""Where results that can be made again are kept between runs: tokenised corpora, chosen layouts, compiled programs."""

import os
from collections.abc import Mapping
from pathlib import Path


def user_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """$FLACUNA_CACHE, else flacuna_jax in the user's cache directory."""
    given = environment.get("FLACUNA_CACHE")
    return Path(given) if given else Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flacuna_jax"
