"""Paged attention's GPU members, under Triton's interpreter where there is no GPU: logic, never tolerance.

Without a GPU this needs TRITON_INTERPRET=1 from the start, so a process of its own runs the checks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = (
    "members_agree",
    "a_row_alone_is_the_row_in_its_chunk",
    "blocks_and_stale_memory_are_free",
    "later_and_other_requests_nan_is_inert",
    "padded_requests_are_inert_and_zero",
    "a_seen_infinity_is_what_the_sum_gives",
    "step_keys_spare_the_gather",
    "variant_kernels_are_refused",
    "head_sizes_and_groups",
    "write_kv_takes_any_strides",
)


@pytest.mark.parametrize("check", CHECKS)
def test_check_holds_under_the_interpreter(check: str) -> None:
    root = Path(__file__).parent.parent
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{root / 'src'}:{root}"}
    command = [sys.executable, "-m", "tests.gpu_attention_checks", check]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
