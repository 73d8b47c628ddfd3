"""Three threads even on two cores, so that a bit that depends on their number has somewhere to show."""

from __future__ import annotations

import os

os.environ["NUMBA_NUM_THREADS"] = str(max(3, os.cpu_count() or 1))
