"""Where results that can be made again are kept between runs: tokenised corpora, chosen layouts, compiled programs."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path


def user_cache(environment: Mapping[str, str] = os.environ) -> Path:
    """$FLACUNA_CACHE, else flacuna_jax in the user's cache directory; where the user has none, as a number without a
    name in a container, a temporary one."""
    given = environment.get("FLACUNA_CACHE")
    if given:
        return Path(given)
    try:
        return Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flacuna_jax"
    except RuntimeError:
        return Path(tempfile.gettempdir()) / f"flacuna_jax-{os.getuid()}"
