"""cuDNN's fused attention as a member: fresh prompts, and chunks after short prefixes, in padded batches.

Its order is what `triton.py` writes down. That it still is, for this version, head size and dtype, is
certified on this machine before it serves (`gpu_record.certify_library`); where it is not, our own members
serve the same bits. Its ragged form and its decode kernel, which splits the keys, are not members and are
never called. So a chunk is served as the whole prompt that it ends, and requests of several lengths as if all
were as long as the longest (`padded.py`); the rule in `gpu_serve.py` says when that pays.

Shape letters: B requests of a batch, L positions, T query rows, H heads, Hkv key/value heads, D head size.
"""

from __future__ import annotations

import torch

from isobatch.kernels.attention.gpu_rows import GpuKVCache, GpuPagedRows
from isobatch.kernels.attention.padded import into_batch, out_of_batch


def attention_cudnn(
    q: torch.Tensor,
    cache: GpuKVCache,
    rows: GpuPagedRows,
    scale: float,
    *,
    chosen: tuple[int, ...],
    out: torch.Tensor,
) -> torch.Tensor:
    """Attention of chunks, all in one batch.

    Args:
        q: bf16 or fp16 [T, H, D], on the device, D contiguous.
        cache: of the layer, with the step's own keys and values.
        rows: whose queries these are, and whose `contexts` are exact for the chosen requests.
        scale: of the scores, positive.
        chosen: the requests to serve.
        out: where to write, like q and contiguous.

    Returns:
        out; rows of requests that were not chosen are left alone.

    Determinism:
        As the members of `triton.py`, bit for bit, wherever certified and all values are finite. A NaN or an
        infinity among a prompt's values may reach its rows up to 127 places before it: the library multiplies
        what it has masked by zero. Such a request's own last row is NaN too, so that it fails whoever serves
        it.
    """
    batch = _causal(*into_batch(q, cache, rows, chosen), scale)
    out_of_batch(batch, out, rows, chosen)
    return out


def fresh_prompt(q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """One prompt with as many keys as queries: what the library returns, which nothing needs to copy.

    Args:
        q: bf16 or fp16 [T, H, D], on the device, D contiguous.
        key: likewise [T, Hkv, D].
        value: likewise.
        scale: of the scores, positive.

    Returns:
        Like q, contiguous.

    Determinism:
        As `attention_cudnn`.
    """
    return _causal(q[None], key[None], value[None], scale)[0]


def _causal(q: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """[B, L, H, D], contiguous; q likewise, keys and values [B, L, Hkv, D]."""
    heads = (t.transpose(1, 2) for t in (q, key, value))
    run = torch.ops.aten._scaled_dot_product_cudnn_attention
    result: torch.Tensor = run(*heads, None, False, 0.0, True, False, scale=scale)[0]
    return result.transpose(1, 2).contiguous()
