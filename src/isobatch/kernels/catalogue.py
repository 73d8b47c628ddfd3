"""All records, by name."""

from __future__ import annotations

from isobatch.errors import UnknownKeyError
from isobatch.kernels.activation.record import SILU_AND_MUL
from isobatch.kernels.attention.record import ATTENTION
from isobatch.kernels.embedding.record import EMBEDDING
from isobatch.kernels.linear.record import LINEAR
from isobatch.kernels.log_probs.record import LOG_SOFTMAX, TOP_LOG_PROBS
from isobatch.kernels.moe.record import MOE
from isobatch.kernels.registry import OpRecord
from isobatch.kernels.rms_norm.record import RMS_NORM
from isobatch.kernels.rotary.record import ROTARY
from isobatch.kernels.sampling.record import PENALIZE, SAMPLE

RECORDS: dict[str, OpRecord] = {
    record.name: record
    for record in (
        EMBEDDING,
        LINEAR,
        RMS_NORM,
        ROTARY,
        ATTENTION,
        SILU_AND_MUL,
        MOE,
        LOG_SOFTMAX,
        TOP_LOG_PROBS,
        PENALIZE,
        SAMPLE,
    )
}


def record(name: str) -> OpRecord:
    """The record of an op.

    Raises:
        UnknownKeyError: no op has this name.
    """
    if name not in RECORDS:
        raise UnknownKeyError("op", name, RECORDS)
    return RECORDS[name]
