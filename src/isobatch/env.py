"""The one reader of os.environ, so that no other module can depend on the environment unseen.

Nothing here may change a bit of any reply; these settings only say where files go.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Where compiled kernels are kept between runs.

    Returns:
        ISOBATCH_CACHE_DIR if set, else XDG_CACHE_HOME/isobatch, else ~/.cache/isobatch.
    """
    if explicit := os.environ.get("ISOBATCH_CACHE_DIR"):
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "isobatch"
