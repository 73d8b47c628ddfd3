"""FlashAttention 3 where it is to be had: the strongest attention to measure against, never a part of ours.

There is no package of its own for it; vLLM ships a build, whose library can be loaded without the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

_LIBRARY = "vllm_flash_attn/_vllm_fa3_C.abi3.so"
# The call has no defaults.
_NOT_USED = (
    *("k_new", "v_new", "q_v", "out", "cu_seqlens_k_new", "seqused_q"),
    *("seqused_k", "page_table", "kv_batch_idx", "leftpad_k", "rotary_cos", "rotary_sin", "seqlens_rotary"),
    *("q_descale", "k_descale", "v_descale", "scheduler_metadata", "pack_gqa", "s_aux", "cp_tot_seqused_k"),
)


@cache
def flash_attention_3() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor] | None:
    """The causal forward pass with its free choice of splits; None where it is not installed.

    Returns:
        A function of q [R, Tq, H, D], k and v [R, Tk, Hkv, D] and the scale; the mask ends with the keys.
    """
    found = find_spec("vllm")
    libraries = (Path(folder) / _LIBRARY for folder in (found and found.submodule_search_locations) or ())
    library = next(filter(Path.exists, libraries), None)
    if library is None:
        return None
    torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        requests, queries, keys = len(q), q.shape[1], k.shape[1]
        out: torch.Tensor = torch.ops._vllm_fa3_C.fwd(
            q=q.flatten(0, 1),
            k=k.flatten(0, 1),
            v=v.flatten(0, 1),
            # This build knows only requests of various lengths, one after the other.
            cu_seqlens_q=_begins(requests, queries, q.device),
            cu_seqlens_k=_begins(requests, keys, q.device),
            max_seqlen_q=queries,
            max_seqlen_k=keys,
            softmax_scale=scale,
            is_causal=True,
            window_size_left=-1,
            window_size_right=-1,
            softcap=0.0,
            is_rotary_interleaved=True,
            num_splits=0,
            sm_margin=0,
            cp_world_size=1,
            cp_rank=0,
            **dict.fromkeys(_NOT_USED),
        )[0]
        return out.view(requests, queries, *out.shape[1:])

    return run


@cache
def _begins(requests: int, length: int, device: torch.device) -> torch.Tensor:
    """Where each of equally long requests begins, and the end; kept, so that no timed run makes it."""
    return torch.arange(0, (requests + 1) * length, length, dtype=torch.int32, device=device)
