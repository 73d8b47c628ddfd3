"""Records of log_softmax and top_log_probs on the GPU."""

from __future__ import annotations

from functools import partial

from isobatch.kernels.data import floats, integers
from isobatch.kernels.gpu.data import to_device
from isobatch.kernels.gpu.device import INTERPRETED
from isobatch.kernels.log_probs import stock, triton
from isobatch.kernels.registry import Member, OpRecord, RowCase
from isobatch.kernels.stock import STOCK

# One span, and three of which the last is short. The interpreter takes a second for a few rows of these.
_VOCABULARIES = {"short": 1003} if INTERPRETED else {"short": 1003, "spans": 9001}


def _draw_logits(name: str, rows: int, variant: str) -> RowCase:
    V = _VOCABULARIES[variant]
    logits = floats(f"{name}/logits", rows, V, kind="plain") * 4
    logits[:, V // 2] = logits[:, 7]  # a tie
    return RowCase({"logits": to_device(logits)}, {})


def _draw_top(name: str, rows: int, variant: str) -> RowCase:
    case = _draw_logits(name, rows, variant)
    case.per_row["chosen"] = to_device(integers(f"{name}/chosen", rows, _VOCABULARIES[variant]))
    return RowCase(case.per_row, {"count": 5})


LOG_SOFTMAX = OpRecord(
    name="log_softmax",
    order=triton.__doc__ or "",
    free_axes=("rows", "warps"),
    fixed_axes=("V",),
    members=(
        Member("one warp", partial(triton.log_softmax_cut, width=1024, warps=1), STOCK),
        Member("rule", triton.log_softmax, STOCK),
        Member("eight warps", partial(triton.log_softmax_cut, width=2048, warps=8), STOCK),
    ),
    production="rule",
    stock=Member("torch", stock.log_softmax, STOCK),
    reference=stock.log_softmax_ref,
    draw=_draw_logits,
    variants=tuple(_VOCABULARIES),
    thresholds=(8,),
)

TOP_LOG_PROBS = OpRecord(
    name="top_log_probs",
    order=triton.__doc__ or "",
    free_axes=("rows", "warps"),
    fixed_axes=("V", "count"),
    members=(
        Member("one warp", partial(triton.top_log_probs_cut, warps=1), STOCK),
        Member("rule", triton.top_log_probs, STOCK),
        Member("four warps", partial(triton.top_log_probs_cut, warps=4), STOCK),
    ),
    production="rule",
    stock=Member("torch", stock.top_log_probs, STOCK),
    reference=None,
    draw=_draw_top,
    variants=tuple(_VOCABULARIES),
    thresholds=(8,),
)
