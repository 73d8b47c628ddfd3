"""Paged attention's GPU members, each check in a process of its own: on a GPU where there is one, else under
Triton's interpreter. On a GPU also lengths that an interpreter would never see the end of.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from isobatch.bits import bits_equal
from isobatch.kernels.attention.gpu_record import ATTENTION_GPU, GpuAttentionCase
from isobatch.kernels.gpu.device import INTERPRETED, device, dtypes

CHECKS = (
    "members_agree",
    "a_row_alone_is_the_row_in_its_chunk",
    "blocks_and_stale_memory_are_free",
    "later_and_other_requests_nan_is_inert",
    "padded_requests_are_inert_and_zero",
    "requests_without_queries_are_inert",
    "a_seen_infinity_is_what_the_sum_gives",
    "step_keys_spare_the_gather",
    "variant_kernels_are_refused",
    "head_sizes_and_groups",
    "write_kv_takes_any_strides",
)


@pytest.mark.parametrize("check", CHECKS)
def test_check_holds(check: str) -> None:
    root = Path(__file__).parent.parent
    path = os.pathsep.join(filter(None, (str(root / "src"), str(root), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-m", "tests.gpu_attention_checks", check]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(INTERPRETED, reason="no GPU")
@pytest.mark.parametrize("context", [1, 2, 127, 128, 129, 1000, 4096, 32_768, 131_072])
def test_decode_row_is_prefill_row_at_any_length(context: int) -> None:
    random_ = torch.Generator(device()).manual_seed(context)
    q, k, v = (
        torch.randn(1, context, heads, 128, generator=random_, device=device()).to(dtypes()[0])
        for heads in (8, 2, 2)
    )
    chunk = GpuAttentionCase(tuple((0, p) for p in range(max(0, context - 40), context)), q, k, v)
    member = ATTENTION_GPU.member(ATTENTION_GPU.production)
    together = chunk.call(member)[0]
    for row in {0, chunk.rows - 1}:
        assert bits_equal(chunk.take([row]).call(member)[0], together[row : row + 1])
