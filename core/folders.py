"""Where Diffoundry keeps on this machine what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """$DIFFOUNDRY_CACHE, else the user's cache folder for diffoundry."""
    named = os.environ.get("DIFFOUNDRY_CACHE")
    if named:
        return Path(named).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("diffoundry")
