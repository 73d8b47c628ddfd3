"""Compilation of CPU kernels with numba: strict IEEE arithmetic, cached on disk by content.

No fast-math flag is ever set, so LLVM may vectorise over independent outputs but may not reassociate,
contract or approximate: what a kernel's source says is, bit for bit, what every CPU does.
"""

from __future__ import annotations

import atexit
import hashlib
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy.typing as npt
import torch
from numba.core import config as numba_config

from isobatch import env

# numba's fallback threading layer aborts the process when two Python threads enter it at once.
# Holding this while a parallel kernel runs costs nothing: the kernel uses every core anyway.
LAUNCH = threading.RLock()


@cache
def cache_path() -> Path:
    """The folder for compiled kernels of exactly this source.

    numba's own cache notices a change only in the file that holds the compiled function, not in what it
    calls. A stale kernel would be a wrong bit, so the folder is named after all kernel sources together.

    Returns:
        A path that changes whenever any kernel source or numba itself changes; a temporary one, compiled into
        anew by each process, where the cache folder cannot be written.
    """
    sha = hashlib.sha256(numba.__version__.encode())
    root = Path(__file__).resolve().parent.parent
    for source in sorted(root.rglob("*.py")):
        sha.update(source.relative_to(root).as_posix().encode())
        sha.update(source.read_bytes())
    path = env.cache_dir() / f"kernels-{sha.hexdigest()[:16]}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError:
        # numba would quietly fall back to a folder that cannot tell stale kernels from fresh ones.
        fresh = Path(tempfile.mkdtemp(prefix="isobatch-kernels-"))
        atexit.register(shutil.rmtree, fresh, ignore_errors=True)
        return fresh


@contextmanager
def _numba_cache_at(path: Path) -> Iterator[None]:
    """Points numba's cache at `path` while a function is decorated, and puts the setting back."""
    before = numba_config.CACHE_DIR
    numba_config.CACHE_DIR = str(path)
    try:
        yield
    finally:
        numba_config.CACHE_DIR = before


def kernel(function: Callable[..., Any]) -> Any:
    """Compiles a parallel kernel: `numba.prange` inside, arrays and scalars as arguments."""
    with _numba_cache_at(cache_path()):
        return numba.njit(parallel=True, cache=True, error_model="numpy")(function)


def device(function: Callable[..., Any]) -> Any:
    """Compiles a helper that kernels call; inlined by LLVM, never launched itself."""
    return numba.njit(error_model="numpy", inline="never")(function)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs kernels on `count` threads inside the block; no bit may depend on it.

    Args:
        count: from 1 to the number numba started with.
    """
    before = numba.get_num_threads()
    numba.set_num_threads(count)
    try:
        yield
    finally:
        numba.set_num_threads(before)


def max_threads() -> int:
    """How many threads kernels may use on this machine."""
    return int(numba_config.NUMBA_NUM_THREADS)


def array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """A CPU tensor as a C-contiguous array, without a copy if it is one already.

    One layout means one compiled specialisation of each kernel, and vector loads along rows.
    """
    return tensor.contiguous().numpy()
