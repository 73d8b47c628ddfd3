"""cuDNN's fused attention as a member: one fresh prompt at a time, at the library's own speed.

Its order is what `triton.py` writes down. That it still is, for this version, head size and dtype, is
certified on this machine before it serves (`gpu_record.certify_library`); where it is not, our own members
serve the same bits. Its ragged form and its decode kernel, which splits the keys, are not members and are
never called.

Shape letters: T query rows, H heads, Hkv key/value heads, D head size.
"""

from __future__ import annotations

import torch

from isobatch.kernels.attention.gpu_rows import GpuPagedRows


def attention_cudnn(
    q: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    origins: tuple[int, ...],
    rows: GpuPagedRows,
    scale: float,
    *,
    chosen: tuple[int, ...],
    out: torch.Tensor,
) -> torch.Tensor:
    """Attention of fresh prompts, which have as many keys as queries, one request after another.

    Args:
        q: bf16 or fp16 [T, H, D], on the device, D contiguous.
        key: likewise [N, Hkv, D], each request's in one piece.
        value: likewise.
        origins: the row of `key` and `value` with each request's position 0.
        rows: whose queries these are.
        scale: of the scores, positive.
        chosen: the requests to serve.
        out: where to write, like q and contiguous.

    Returns:
        out; rows of requests that were not chosen are left alone.

    Determinism:
        As the members of `triton.py`, bit for bit, wherever certified and all values are finite. A NaN or an
        infinity among a prompt's values may reach rows up to 127 places before it: the library multiplies
        what it has masked by zero. Such a request's own last row is NaN too, so that it fails whoever serves
        it.
    """
    for r in chosen:
        begin, n = rows.begins[r], rows.queries[r]
        own = slice(origins[r], origins[r] + n)
        out[begin : begin + n] = fresh_prompt(q[begin : begin + n], key[own], value[own], scale)
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
    heads = (t.transpose(0, 1)[None] for t in (q, key, value))
    run = torch.ops.aten._scaled_dot_product_cudnn_attention
    result: torch.Tensor = run(*heads, None, False, 0.0, True, False, scale=scale)[0]
    return result[0].transpose(0, 1).contiguous()
