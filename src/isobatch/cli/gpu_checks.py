"""The self test on a GPU: which kernels, ours and the libraries', give the class's bits here, and which not.

A library's kernel that is refused is no failure: it does not serve here, and ours does, with the same bits.
"""

from __future__ import annotations

from isobatch.cli.checks import Check, Progress, check_members
from isobatch.kernels import plan as plans
from isobatch.kernels.attention.gpu_record import certify_library
from isobatch.kernels.gpu.catalogue import GPU_RECORDS
from isobatch.kernels.gpu.device import INTERPRETED, architecture, dtypes
from isobatch.kernels.linear.gpu import refusal
from isobatch.kernels.linear.gpu_record import forget
from isobatch.kernels.linear.members import Shape

_HEADS = (32, 8)
_HEAD_SIZES = (64, 96, 128, 256)
# Another library's kernels run on a GPU alone.
_LIBRARIES = not INTERPRETED


def checks(progress: Progress) -> list[Check]:
    """All of them; the verdicts on single kernels are in their details.

    Raises:
        UnsupportedOpError: no GPU that will do.
        IntegrityError: the inputs of a check cannot show what it is looking for.
    """
    libraries = (_attention, _products) if _LIBRARIES else ()
    return [check_members(progress, GPU_RECORDS), *(check(progress) for check in libraries)]


def _attention(progress: Progress) -> Check:
    """cuDNN's attention, by head size and dtype."""
    details, admitted = [], 0
    for dtype in dtypes():
        for head_size in _HEAD_SIZES:
            progress(f"cuDNN at head size {head_size}")
            verdict = certify_library(*_HEADS, head_size, dtype)
            admitted += verdict.member
            details.append(f"head size {head_size}, {dtype}: {verdict}")
    return Check("cuDNN", f"{admitted} of {len(details)} are members", (), tuple(details))


def _products(progress: Progress) -> Check:
    """cuBLASLt's algorithms, wherever a table that ships names one."""
    plan, details, admitted = plans.shipped(architecture()), [], 0
    for key in plan.ops.get("linear", {}):
        progress(f"cuBLASLt at {key}")
        for rows in plans.BUCKETS:
            for name in plan.names("linear", key, rows):
                if name.startswith("lt"):
                    why = refusal(Shape.of(key), name, rows)
                    admitted += why is None
                    details.append(f"{key}, {rows} rows, {name}: {why or 'member'}")
        forget()
    return Check("cuBLASLt", f"{admitted} of {len(details)} serve", (), tuple(details))
