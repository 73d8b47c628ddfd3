"""The records of the GPU, by name."""

from __future__ import annotations

from isobatch.kernels.activation.gpu_record import SILU_AND_MUL
from isobatch.kernels.attention.gpu_record import ATTENTION_GPU
from isobatch.kernels.embedding.gpu_record import EMBEDDING
from isobatch.kernels.gated.gpu_record import GATED
from isobatch.kernels.linear.gpu_record import LINEAR
from isobatch.kernels.linear.gpu_record_float32 import LINEAR_FLOAT32
from isobatch.kernels.log_probs.gpu_record import LOG_SOFTMAX, TOP_LOG_PROBS
from isobatch.kernels.moe.gpu_record import MOE
from isobatch.kernels.qkv.gpu_record import QK_NORM_ROTARY_WRITE
from isobatch.kernels.registry import OpRecord
from isobatch.kernels.rms_norm.gpu_record import RMS_NORM
from isobatch.kernels.rotary.gpu_record import ROTARY
from isobatch.kernels.sampling.gpu_record import PENALIZE, SAMPLE

GPU_RECORDS: dict[str, OpRecord] = {
    record.name: record
    for record in (
        EMBEDDING,
        LINEAR,
        LINEAR_FLOAT32,
        RMS_NORM,
        ROTARY,
        QK_NORM_ROTARY_WRITE,
        ATTENTION_GPU,
        SILU_AND_MUL,
        GATED,
        MOE,
        LOG_SOFTMAX,
        TOP_LOG_PROBS,
        PENALIZE,
        SAMPLE,
    )
}
