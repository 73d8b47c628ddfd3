"""Paged attention's GPU members, each check in a process of its own: on a GPU where there is one, else under
Triton's interpreter. On a GPU also lengths that an interpreter would never see the end of.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from isobatch.bits import bits_equal
from isobatch.kernels.attention.gather import gather
from isobatch.kernels.attention.gpu_record import (
    ATTENTION_GPU,
    GPU_ATTENTION,
    GpuAttentionCase,
    certify_library,
    numbers,
    side_by_side,
)
from isobatch.kernels.attention.gpu_rows import GpuKVCache, GpuPagedRows
from isobatch.kernels.attention.gpu_serve import Attention, feeds
from isobatch.kernels.gpu.device import INTERPRETED, device, dtypes, gluon_runs
from isobatch.kernels.registry import Member

CHECKS = (
    "members_agree",
    "a_row_alone_is_the_row_in_its_chunk",
    "blocks_and_stale_memory_are_free",
    "later_and_other_requests_nan_is_inert",
    "padded_requests_are_inert_and_zero",
    "requests_without_queries_are_inert",
    "a_seen_infinity_is_what_the_sum_gives",
    "spoilt_pieces_alone_are_computed_again",
    "gathered_keys_are_copies",
    "a_batch_holds_whole_prompts_and_zeros",
    "lengths_that_are_planned_are_few",
    "requests_in_a_batch_are_nearly_as_long",
    "variant_kernels_are_refused",
    "maxima_move_in_some_blocks_and_not_in_others",
    "head_sizes_and_groups",
    "write_kv_takes_any_strides",
)


# Of Hopper: kernels in Gluon, which Triton's interpreter does not know, and those that are launched early.
ON_HOPPER = (
    "tables_that_come_right_before_are_seen",
    "rings_run_on_from_item_to_item",
    "runs_of_blocks_are_handed_over",
    "scores_that_come_late_are_waited_for",
)


_ON_HOPPER = pytest.mark.skipif(not gluon_runs(), reason="no Hopper GPU")


@pytest.mark.parametrize("check", [*CHECKS, *(pytest.param(check, marks=_ON_HOPPER) for check in ON_HOPPER)])
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


@pytest.mark.skipif(INTERPRETED, reason="no GPU")
def test_prompts_in_a_librarys_batch_are_those_alone() -> None:
    """Of any lengths, after prefixes or not, and whatever a neighbour holds: that it is NaN, too."""
    spans = ((0, 700), (100, 690), (0, 641), (0, 513), (0, 1024), (90, 1000))
    random_ = torch.Generator(device()).manual_seed(5)
    shapes = ((len(spans), 1024, heads, 128) for heads in (8, 2, 2))
    q, k, v = (torch.randn(s, generator=random_, device=device()).to(dtypes()[0]) for s in shapes)
    case = GpuAttentionCase(tuple((r, p) for r, span in enumerate(spans) for p in range(*span)), q, k, v)
    library = Member("library", Attention(library=_certified(), gluon=False), GPU_ATTENTION)
    together = case.call(library)[0]
    assert bits_equal(together, case.call(ATTENTION_GPU.canonical)[0])
    begins = [sum(end - first for first, end in spans[:r]) for r in range(len(spans) + 1)]
    for begin, end in pairwise(begins):
        rows = range(begin, end)
        assert bits_equal(case.take(rows).call(library)[0], together[begin:end])
        spoilt = case.poison(rows, float("nan")).call(library)[0]
        assert bits_equal(spoilt[begin:end], together[begin:end])
        assert not bits_equal(spoilt, together)


@cache
def _certified() -> bool:
    return certify_library(8, 2, 128, dtypes()[0]).member


@pytest.mark.skipif(INTERPRETED, reason="no GPU")
@pytest.mark.parametrize("before", [0, 128])
@pytest.mark.parametrize("fed", [False, True])
def test_a_lone_prompt_is_read_where_the_step_has_it(fed: bool, before: int) -> None:
    """With the engine's strides; not so a chunk after a prefix, of which the step has not all keys."""
    q, k, v = numbers("lone", 1, 1024, 8, 2, 128, dtypes()[0])
    case = GpuAttentionCase(tuple((0, p) for p in range(before, 1024)), q, k, v)
    spoil = not before and (feeds(128) if fed else _certified())  # whoever looks in the cache, fails
    queries, own = side_by_side(q[0, before:], k[0, before:], v[0, before:])

    def call(q: torch.Tensor, cache: GpuKVCache, rows: GpuPagedRows, scale: float) -> torch.Tensor:
        assert len(q) == len(queries)  # the same ones, in one piece
        cache = GpuKVCache(torch.full_like(cache.k, float("nan")), cache.v) if spoil else cache
        return Attention(library=_certified(), gluon=fed)(queries, cache, rows, scale, own)

    got = case.call(Member("own", call, GPU_ATTENTION))[0]
    assert bits_equal(got, case.call(ATTENTION_GPU.canonical)[0])


_SPANS = ((0, 700), (100, 690), (0, 65), (0, 128), (0, 1024), (90, 1000), (0, 64), (37, 640))


def _fed(q: torch.Tensor, cache: GpuKVCache, rows: GpuPagedRows, scale: float) -> torch.Tensor:
    """As a step has it: with its own keys and values, and with the engine's strides."""
    everyone = tuple(range(len(rows.queries)))
    key, value, origins = gather(cache, rows, everyone)
    ends = [o + n for o, n in zip(origins.tolist(), rows.contexts, strict=True)]
    at = torch.cat([torch.arange(e - n, e) for e, n in zip(ends, rows.queries, strict=True)]).to(device())
    queries, own = side_by_side(q, key[at], value[at])
    return Attention(chunk="fed")(queries, cache, rows, scale, own)


@pytest.mark.skipif(INTERPRETED, reason="no GPU")
@pytest.mark.parametrize("function", [Attention(chunk="fed"), _fed], ids=["gathered", "own"])
def test_fed_prompts_are_those_alone(function: Callable[..., torch.Tensor]) -> None:
    """Of any lengths, after prefixes or not, and whatever a neighbour, or what lies beyond, holds."""
    case, fed = _prompts(), Member("fed", function, GPU_ATTENTION)
    together = case.call(fed)[0]
    assert bits_equal(together, case.call(ATTENTION_GPU.canonical)[0])
    for rows in _requests():
        assert bits_equal(case.take(rows).call(fed)[0], together[rows.start : rows.stop])
        spoilt = case.poison(rows, float("nan")).call(fed)[0]
        assert bits_equal(spoilt[rows.start : rows.stop], together[rows.start : rows.stop])
        assert not bits_equal(spoilt, together)


@pytest.mark.skipif(INTERPRETED, reason="no GPU")
@pytest.mark.parametrize("function", [Attention(chunk="fed"), _fed], ids=["gathered", "own"])
def test_control_spoilt_tiles_that_stay_are_caught(function: Callable[..., torch.Tensor]) -> None:
    if not feeds(128):
        pytest.skip("for Hopper")
    case, fed = _prompts(), Member("fed", function, GPU_ATTENTION)
    together = case.call(fed)[0]
    with patch("isobatch.kernels.attention.gluon_prefill.attention_again"):
        assert bits_equal(case.call(fed)[0], together)
        spoilt = [case.poison(rows, float("nan")).call(fed)[0] for rows in _requests()]
    kept = [slice(rows.start, rows.stop) for rows in _requests()]
    assert not all(bits_equal(got[k], together[k]) for got, k in zip(spoilt, kept, strict=True))


def _prompts() -> GpuAttentionCase:
    random_ = torch.Generator(device()).manual_seed(7)
    shapes = ((len(_SPANS), 1024, heads, 128) for heads in (8, 2, 2))
    q, k, v = (torch.randn(s, generator=random_, device=device()).to(dtypes()[0]) for s in shapes)
    queries = tuple((r, p) for r, span in enumerate(_SPANS) for p in range(*span))
    return GpuAttentionCase(queries, q, k, v, fill=float("nan"))


def _requests() -> list[range]:
    """The rows of each request of `_prompts`."""
    begins = [0, *accumulate(end - first for first, end in _SPANS)]
    return [range(*pair) for pair in pairwise(begins)]
