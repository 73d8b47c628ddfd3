"""The one reader of os.environ, so that no other module can depend on the environment unseen.

Nothing here may change a bit of any reply: these settings say where files go and how threads wait.
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


def shorten_spin() -> None:
    """Has GNU's OpenMP wait briefly before it sleeps, if it is not loaded yet and the user has not chosen.

    By default it spins for milliseconds. On a machine that does anything else besides, the spinning thread
    keeps the one that it waits for off the core: measured with three busy neighbours on two cores, 0.4
    tokens/s instead of 14. Ten thousand turns outlast the gap between two kernels of a step, and little more.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
