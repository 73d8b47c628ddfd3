"""How accurate the GPU's written orders are: against float64, at most twice torch's own error."""

from __future__ import annotations

import pytest
import torch

from isobatch.kernels.attention.gpu_record import GpuAttentionCase
from isobatch.kernels.data import floats
from isobatch.kernels.gpu.catalogue import GPU_RECORDS
from isobatch.kernels.gpu.data import SHORT, to_device
from isobatch.kernels.gpu.device import INTERPRETED, dtypes
from isobatch.kernels.linear.gpu_record import case as linear_case
from isobatch.kernels.linear.members import Shape
from isobatch.kernels.moe.gpu_record import case as experts_case
from isobatch.kernels.registry import Case, Member, Outputs, RowCase
from isobatch.kernels.stock import STOCK

# NumPy warns where the interpreter rounds to float16 what the GPU rounds to infinity in silence.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")

REFERENCED = [
    pytest.param(record, dtype, id=f"{record.name}-{SHORT[dtype]}")
    for record in GPU_RECORDS.values()
    if record.reference is not None
    for dtype in dtypes()
]
ROWS = 8 if INTERPRETED else 64


def _attention(dtype: torch.dtype) -> GpuAttentionCase:
    """The last rows of a prompt, and decode steps of another."""
    H, Hkv, D, length = (2, 1, 16, 256) if INTERPRETED else (8, 2, 128, 2048)
    q, k, v = (
        to_device(floats(f"accuracy/{name}", 2, length, heads, D, kind="plain"), dtype)
        for name, heads in (("q", H), ("k", Hkv), ("v", Hkv))
    )
    chunk = tuple((0, p) for p in range(length - ROWS // 2, length))
    return GpuAttentionCase((*chunk, *((1, 31 * i) for i in range(ROWS // 2))), q, k, v)


def ordinary(op: str, dtype: torch.dtype) -> list[Case]:
    """Cases of ordinary numbers: of a sum whose terms cancel, no error can be told."""
    if op == "attention":
        return [_attention(dtype)]
    if op == "linear":
        shape = Shape(48, 64, dtype, dtype) if INTERPRETED else Shape(1024, 4096, dtype, dtype)
        drawn = linear_case(shape, "wide", ROWS)
        # Torch's linear has no say in the dtype of its result.
        return [RowCase(drawn.per_row, {key: drawn.shared[key] for key in ("weight", "bias")})]
    if op == "gated":  # neither half's sums cancel
        return [GPU_RECORDS[op].draw("accuracy", ROWS, f"ordinary/{SHORT[dtype]}")]
    if op == "moe":
        return [experts_case("accuracy", ROWS, "plain", dtype)]
    record = GPU_RECORDS[op]
    # Variants in float32 are for certification, but of what is float32 whatever the model's dtype.
    own = [v for v in record.variants if v.endswith(f"/{SHORT[dtype]}")] or record.variants
    return [record.draw(f"accuracy/{op}/{variant}", ROWS, variant) for variant in own]


def _error(outputs: Outputs, exact: Outputs) -> list[float]:
    """The median row's worst error, of each output: one row's luck, or torch's, does not decide."""
    return [
        float((o.double() - e.double()).abs().flatten(1).amax(1).median())
        for o, e in zip(outputs, exact, strict=True)
    ]


@pytest.mark.parametrize(("record", "dtype"), REFERENCED)
def test_error_is_at_most_twice_torchs_own(record, dtype) -> None:  # type: ignore[no-untyped-def]
    for drawn in ordinary(record.name, dtype):
        exact = drawn.call(Member("float64", record.reference, STOCK))
        ours = _error(drawn.call(record.member(record.production)), exact)
        # Torch's grouped product runs on the GPU alone. Without it: the error of rounding the exact result,
        # twice, since the inner width is rounded too.
        if INTERPRETED and record.name == "moe":
            theirs = [2 * error for error in _error(tuple(e.to(dtype) for e in exact), exact)]
        else:
            theirs = _error(drawn.call(record.stock), exact)
        for error, torchs in zip(ours, theirs, strict=True):
            assert error <= 2 * torchs, f"{error:.3e} against torch's {torchs:.3e}"
