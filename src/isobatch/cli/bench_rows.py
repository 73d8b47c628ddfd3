"""Row-wise kernels against the memory: norms, activation and rotation move numbers and do little else."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from isobatch.cli.goals import Goal, Point, at_least
from isobatch.kernels.activation.triton import silu_and_mul
from isobatch.kernels.gpu.device import device, dtypes
from isobatch.kernels.gpu.timing import Work, microseconds
from isobatch.kernels.rms_norm.triton import rms_norm
from isobatch.kernels.rotary.triton import rotary
from isobatch.models.presets import preset

_MODEL = "qwen3-8b"
_ROWS = (1, 64, 1024, 4096, 16_384)
_COLD_BYTES = 200 << 20
_LARGE_BYTES = 32 << 20


def row_points(limits: dict[str, float], progress: Callable[[str], None]) -> Iterator[Point]:
    """Every kernel at every number of rows.

    Args:
        limits: bytes_per_s of the device.
        progress: told each kernel.
    """
    d, dtype = preset(_MODEL), dtypes()[0]
    half = d.head_size // 2
    weight = torch.ones(d.hidden, dtype=dtype, device=device())
    angles = torch.ones(_ROWS[-1], half, dtype=torch.float32, device=device())
    size, row_angles = dtype.itemsize, 2 * half * angles.itemsize + torch.int64.itemsize
    for rows in _ROWS:
        positions = torch.arange(rows, device=device())
        # Bytes read and written per row, and what does it to one copy of them.
        kernels: dict[str, tuple[int, tuple[int, ...], Callable[[torch.Tensor], object]]] = {
            "rms_norm": (2 * size * d.hidden, (d.hidden,), lambda x: rms_norm(x, weight, 1e-6)),
            "rms_norm, residual": (
                4 * size * d.hidden,
                (2, d.hidden),
                lambda x: rms_norm(x[:, 0], weight, 1e-6, x[:, 1]),
            ),
            "silu_and_mul": (3 * size * d.inner, (2 * d.inner,), silu_and_mul),
            "rotary": (
                2 * size * d.heads * d.head_size + row_angles,
                (d.heads, d.head_size),
                lambda x, at=positions: rotary(x, at, angles, angles),  # type: ignore[misc]
            ),
        }
        for name, (row_bytes, shape, kernel) in kernels.items():
            progress(f"{name}, {rows} rows")
            moved = rows * row_bytes
            copies = max(2, min(16, _COLD_BYTES // moved))
            inputs = [torch.ones(rows, *shape, dtype=dtype, device=device()) for _ in range(copies)]
            work: Work = lambda copy, f=kernel, x=inputs: f(x[copy])  # type: ignore[misc] # noqa: E731
            (ours,) = microseconds([work], copies)
            floor = moved / limits["bytes_per_s"] * 1e6
            yield {
                "op": name,
                "rows": rows,
                "isobatch_us": ours,
                "floor_us": floor,
                "bandwidth_share": floor / ours,
                "bytes": moved,
            }


def row_summary(points: list[Point]) -> list[Goal]:
    """The goals, and whether they are met."""
    names = dict.fromkeys(point["op"] for point in points)
    return [
        at_least(
            f"{name}: least share of bandwidth from 32 MB up",
            min(p["bandwidth_share"] for p in points if p["op"] == name and p["bytes"] >= _LARGE_BYTES),
            0.85,
        )
        for name in names
    ]
