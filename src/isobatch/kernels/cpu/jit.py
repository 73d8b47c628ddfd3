"""Compilation of CPU kernels with numba: strict IEEE arithmetic, cached on disk by content.

No fast-math flag is ever set, so LLVM may vectorise over independent outputs but may not reassociate,
contract or approximate: what a kernel's source says is, bit for bit, what every CPU does.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from numba.core import config as numba_config

from isobatch import env
from isobatch.errors import ConfigError, ForkedProcessError
from isobatch.kernels import sources

# numba's fallback threading layer aborts the process when two Python threads enter it at once.
# Holding this while a parallel kernel runs costs nothing: the kernel uses every core anyway.
_LAUNCH = threading.RLock()

SMALL = 4096
"""Numbers that one thread goes through in about the time that it takes to call the others."""

_forked = False


def _after_fork() -> None:
    global _forked
    try:
        numba.threading_layer()
    except ValueError:  # no kernel has run yet: the child starts threads of its own
        return
    _forked = True


os.register_at_fork(after_in_child=_after_fork)


def require_threads() -> None:
    """Refuses a process in which kernels cannot run.

    Raises:
        ForkedProcessError: it was forked from one that had run kernels. Their threads stayed behind, and
            OpenMP would end the child without a word.
        ConfigError: numba is told not to compile.
    """
    if _forked:
        raise ForkedProcessError(
            "this process was forked after kernels had run, and their threads stayed behind",
            fix="fork before the first model is loaded, or start processes with multiprocessing's 'spawn'",
        )
    if numba_config.DISABLE_JIT:
        raise ConfigError(
            "kernels have to be compiled", got="NUMBA_DISABLE_JIT is set", fix="unset NUMBA_DISABLE_JIT"
        )


@cache
def cache_path() -> Path:
    """The folder for compiled kernels of exactly this source.

    numba's own cache notices a change only in the file that holds the compiled function, not in what it
    calls. A stale kernel would be a wrong bit, so the folder is named after all kernel sources together.

    Returns:
        A path that changes whenever any kernel source or numba itself changes; a temporary one, compiled into
        anew by each process, where the cache folder cannot be written.
    """
    sha = hashlib.sha256(f"{numba.__version__} {sources.digest()}".encode())
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


class Kernel:
    """A compiled kernel. Called, it runs on all threads.

    Args:
        function: `numba.prange` inside, arrays and scalars as arguments.

    Determinism:
        Threads share out outputs and never a sum, so how many there are changes no bit.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        # Each form is compiled when it is first called. numba's cache cannot tell the two apart by itself.
        # Without the GIL, so that other Python threads, such as a server's event loop, run meanwhile.
        with _numba_cache_at(cache_path()):
            self._on_all = numba.njit(parallel=True, cache=True, nogil=True, error_model="numpy")(function)
        with _numba_cache_at(cache_path() / "alone"):
            self._alone = numba.njit(cache=True, error_model="numpy")(function)

    def __call__(self, *arguments: Any) -> None:
        """Runs on all threads."""
        with _LAUNCH:
            self._on_all(*arguments)

    def sized(self, numbers: int) -> Callable[..., None]:
        """What to call to go through so many numbers: up to SMALL, the calling thread does better alone."""
        return self._alone if numbers <= SMALL else self


def kernel(function: Callable[..., Any]) -> Kernel:
    """Compiles a parallel kernel, as a decorator."""
    return Kernel(function)


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


def empty(*shape: int) -> tuple[torch.Tensor, npt.NDArray[np.float32]]:
    """Uninitialised float32 numbers for a kernel to write: the tensor, and the array of the same memory.

    Made as an array: a tensor costs as much as a small kernel, and then its array as much again.
    """
    numbers = np.empty(shape, np.float32)
    return torch.from_numpy(numbers), numbers
