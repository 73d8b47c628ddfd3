"""What must be settled before anything is imported: how many threads, and where GPU kernels run."""

from __future__ import annotations

import os

import torch

# Three threads even on two cores, so that a bit that depends on their number has somewhere to show.
os.environ["NUMBA_NUM_THREADS"] = str(max(3, os.cpu_count() or 1))
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

    from tests import interpreter

    interpreter.install()
