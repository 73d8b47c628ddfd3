"""The kernels in Gluon, interpreted: the canonical bits, whoever among their warps is fast or slow.

Where there is a GPU they run there (`tests/test_gpu_attention.py`).
"""

from __future__ import annotations

import inspect
import random
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch

from isobatch.bits import bits_equal
from isobatch.kernels.attention import (
    gluon_chain,
    gluon_decode,
    gluon_decode_feed,
    gluon_prefill,
    gluon_steps,
    gpu_serve,
    triton_phases,
)
from isobatch.kernels.attention.gluon_decode import Streamed, attention_streamed, streamed_of
from isobatch.kernels.attention.gluon_prefill import attention_fed
from isobatch.kernels.attention.gpu_record import (
    ATTENTION_GPU,
    GPU_ATTENTION,
    GpuAttentionCase,
    numbers,
    side_by_side,
)
from isobatch.kernels.attention.gpu_rows import GpuKVCache, GpuPagedRows
from isobatch.kernels.attention.triton import Tile, attention_tiled
from isobatch.kernels.attention.triton_phases import RUN, attention_phases
from isobatch.kernels.gpu.device import INTERPRETED, dtypes
from isobatch.kernels.registry import Member
from tests.gluon_interpreter import interpreted
from tests.gluon_threads import give_way

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="a GPU runs them itself"),
    # NumPy, where an inert row divides zero by zero.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
CANONICAL = ATTENTION_GPU.members[0]
# Of the same bits (`tests/test_gpu_attention.py`), and many rows at once.
TILES = Member("tiles", partial(attention_tiled, tile=Tile(64, 4, 1, packed=False)), GPU_ATTENTION)
SEEDS = range(3)
HEADS = [(2, 64), (8, 96), (32, 64)]
"""How many, and their size: groups of 1, 4 and 16, and heads in one part or two."""
Serve = Callable[..., torch.Tensor]
Spans = tuple[tuple[int, int], ...]


@cache
def case_of(spans: Spans, heads: int, D: int, canonical: Member = CANONICAL) -> tuple[Any, torch.Tensor]:
    """Requests with queries from one position up to another, of two key/value heads; and what is expected."""
    name = f"gluon/{spans}/{heads}/{D}"
    q, k, v = numbers(name, len(spans), max(end for _, end in spans), heads, 2, D, dtypes()[0])
    queries = tuple((r, position) for r, span in enumerate(spans) for position in range(*span))
    case = GpuAttentionCase(queries, q, k, v, fill=float("nan"))
    return case, case.call(canonical)[0]


def last_of(*contexts: int) -> Spans:
    return tuple((context - 1, context) for context in contexts)


def gives(case: GpuAttentionCase, expected: torch.Tensor, serve: Serve) -> bool:
    return bits_equal(case.call(Member("gluon", serve, GPU_ATTENTION))[0], expected)


@contextmanager
def planted(module: ModuleType, function: str, edits: Mapping[str, str]) -> Iterator[None]:
    """A function of an interpreted module, with a fault in its text: other words instead of these."""
    text = textwrap.dedent(inspect.getsource(getattr(module, function)))
    text = text[text.index("def ") :]
    for old, new in edits.items():
        assert text.count(old) == 1, (function, old)
        text = text.replace(old, new)
    made: dict[str, Any] = {}
    exec(compile(text, f"<{function}>", "exec"), vars(module), made)
    with patch.object(module, function, made[function]):
        yield


@contextmanager
def _walking(
    modules: list[ModuleType], kernel: str, serve: Serve, seed: int, programs: int
) -> Iterator[Serve]:
    """What is served by programs that walk through items, on a GPU of so many multiprocessors."""
    with (
        interpreted([*modules, gluon_steps], kernel, seed),
        patch.object(modules[0], "multiprocessors", lambda: programs),
    ):
        yield serve


streaming = partial(_walking, [gluon_decode, gluon_decode_feed], "_decode_kernel", attention_streamed)
feeding = partial(_walking, [gluon_prefill], "_prefill_kernel", attention_fed)


@contextmanager
def phased(seed: int, places: int) -> Iterator[Serve]:
    """Decode in phases, whose scores come while the chain runs: blocks in any order, their counts later."""
    draw = random.Random(seed)
    chain = gluon_chain.chain

    def late(
        scores: torch.Tensor, maxima: torch.Tensor, counts: torch.Tensor, *rest: Any, count: int, blocks: int
    ) -> None:
        have = scores.clone().view(counts.shape[0], blocks, -1)
        tops, last = maxima.clone().view(counts.shape[0], blocks, -1), counts.clone()
        scores.fill_(float("nan"))
        maxima.fill_(float("nan"))
        counts.zero_()
        # A run's blocks are its first ones: what lies behind the last of a request is none.
        missing = [(g, n) for g in range(len(have)) for n in range(blocks) if n % RUN < last[g, 0, n // RUN]]
        draw.shuffle(missing)

        def publish() -> None:
            while missing:
                g, n = missing[-1]
                give_way()
                maxima.view_as(tops)[g, n] = tops[g, n]
                give_way()
                scores.view_as(have)[g, n] = have[g, n]
                for slice_ in range(counts.shape[1]):
                    give_way()
                    counts[g, slice_, n // RUN] += 1
                missing.pop()

        kernel.beside, kernel.waited = lambda: (publish,), lambda: not missing
        chain(scores, maxima, counts, *rest, count=count, blocks=blocks)
        assert not missing
        assert not counts.any(), "the next layer counts from zero"

    with (
        interpreted([gluon_chain, gluon_steps], "_chain_kernel", seed) as kernel,
        patch.object(gluon_chain, "chain", late),
        patch.object(triton_phases, "gluon_runs", lambda: True),
        patch.object(triton_phases, "multiprocessors", lambda: places),
    ):
        yield attention_phases


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("heads", "D"), HEADS)
def test_decode_gives_the_canonical_bits(heads: int, D: int, seed: int) -> None:
    world = case_of(last_of(300, 1, 127, 128, 129), heads, D)
    with streaming(seed, programs=1 + seed) as serve:
        for stages in (1, 2, 3):
            assert gives(*world, partial(serve, streamed=Streamed(stages)))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("heads", "D"), HEADS)
def test_chain_gives_the_canonical_bits_while_scores_come(heads: int, D: int, seed: int) -> None:
    with phased(seed, places=(2, 40, 132)[seed]) as serve:
        assert gives(*case_of(last_of(1700, 1, 512, 513), heads, D), serve)


def fed(case: GpuAttentionCase, feed: Serve, at_hand: bool) -> Serve:
    """All requests' chunks; their keys as the step has them, or gathered from their pages."""

    def serve(q: torch.Tensor, cache: GpuKVCache, rows: GpuPagedRows, scale: float) -> torch.Tensor:
        own = None
        if at_hand:
            key, value = (torch.stack([x[r, p] for r, p in case.queries]) for x in (case.k, case.v))
            q, own = side_by_side(q, key, value)
        out = torch.empty(q.shape, dtype=q.dtype)
        return feed(q, cache, rows, scale, chosen=tuple(range(len(rows.queries))), own=own, out=out)

    return serve


@pytest.mark.parametrize("seed", SEEDS)
def test_recorded_steps_stream_single_queries(seed: int) -> None:
    """Beside a chunk, which has tiles; there is room for one more, and programs that find nothing to do."""
    case, expected = case_of((*last_of(300, 1), (90, 140), *last_of(129, 700)), 8, 64)
    for programs in (2, 9):
        with streaming(seed, programs), patch.object(gpu_serve, "gluon_runs", lambda: True):
            assert gives(case, expected, ATTENTION_GPU.member("listed").function)


@pytest.mark.parametrize("settled", [False, True])
def test_of_no_single_queries_nothing_is_written(settled: bool) -> None:
    case, _ = case_of(last_of(300, 1), 8, 64)

    def serve(q: torch.Tensor, cache: GpuKVCache, rows: GpuPagedRows, scale: float) -> torch.Tensor:
        out, none = torch.full_like(q, 7), GpuPagedRows.upload([0])
        rows = replace(rows, settled=settled)
        requests = GpuPagedRows.upload([0, 0])
        streamed_of(q, cache, rows, scale, requests, 2, none, streamed=Streamed(2), out=out)
        return out

    with streaming(0, programs=3):
        (out,) = case.call(Member("none", serve, GPU_ATTENTION))
    assert (out == 7).all()


PROMPTS = ((0, 200), (130, 300), (0, 1), (5, 129))
"""Fresh ones, and chunks after prefixes; tiles that are full, and others."""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("D", [64, 128])
def test_prefill_gives_the_canonical_bits(D: int, seed: int) -> None:
    case, expected = case_of(PROMPTS, 4, D, TILES)
    with feeding(seed, programs=2 + seed) as feed:
        assert gives(case, expected, fed(case, feed, at_hand=seed % 2 == 1))


DECODED = last_of(1700, 300, 1), 8, 64
_KEYS_BACK = "mbarrier.arrive(keys_free.index(after), pred=more)"
_VALUES_THERE = "mbarrier.wait(values_ready.index(s), (turn // STAGES) & 1)"
_VALUES_BACK = "mbarrier.arrive(values_free.index(s))"
_RUN_THERE = "mbarrier.wait(ready.index(s), (g // RUNS) & 1)"
_RUN_BACK = "mbarrier.arrive(free.index(s))"
_GIVEN_BACK = "mbarrier.arrive(free.index(block % KEYS))"
FAULTS: dict[str, tuple[str, ModuleType, str, dict[str, str]]] = {
    "values are not waited for": ("decode", gluon_decode, "_block", {_VALUES_THERE: "pass"}),
    "keys are given back before they are read": (
        "decode",
        gluon_decode,
        "_block",
        {_KEYS_BACK: "pass", "coming = _scores(": f"{_KEYS_BACK}\n    coming = _scores("},
    ),
    "values are given back before they are read": (
        "decode",
        gluon_decode,
        "_block",
        {_VALUES_BACK: "pass", _VALUES_THERE: f"{_VALUES_THERE}\n    {_VALUES_BACK}"},
    ),
    "what lies beyond the last key is seen": (
        "decode",
        gluon_decode,
        "_block",
        {"(j < left)[:, None]": "(j < SPAN)[:, None]"},
    ),
    "scores are not waited for": ("chain", gluon_chain, "_scored", {"known <= g": "False"}),
    "runs are given back before they are read": (
        "chain",
        gluon_chain,
        "_consume",
        {_RUN_BACK: "pass", _RUN_THERE: f"{_RUN_THERE}\n        {_RUN_BACK}"},
    ),
    "counts are not zeroed": (
        "chain",
        gluon_chain,
        "_consume",
        {"for first in range(0, gl.cdiv(blocks, RUN), 128):": "for first in ():"},
    ),
    "a prompt's values are not waited for": (
        "prefill",
        gluon_prefill,
        "_advance",
        {"mbarrier.wait(values_ready.index(vs), (block // VALUES) & 1)": "pass"},
    ),
    "each group gives a block back twice": (
        "prefill",
        gluon_prefill,
        "_advance",
        {_GIVEN_BACK: f"[{_GIVEN_BACK} for _ in range(2)]"},
    ),
}

BY_ORDER = {
    "values are not waited for",
    "keys are given back before they are read",
    "values are given back before they are read",
}
"""Faults that do no harm in some orders of who goes on: what is not waited for may come in time."""


@pytest.mark.parametrize("fault", FAULTS)
def test_control_planted_fault_is_caught(fault: str) -> None:
    orders = range(4) if fault in BY_ORDER else (0,)
    assert any(not _passes(fault, seed) for seed in orders)


def _passes(fault: str, seed: int) -> bool:
    """Whether a kernel with this fault gives the canonical bits in the order drawn by `seed`."""
    kernel, module, function, edits = FAULTS[fault]
    if kernel == "prefill":
        case, expected = case_of(PROMPTS, 4, 64, TILES)
        with feeding(seed, programs=3) as feed, planted(module, function, edits):
            return _right(case, expected, fed(case, feed, at_hand=False))
    case, expected = case_of(*DECODED)
    if kernel == "decode":
        with streaming(seed, programs=2) as serve, planted(module, function, edits):
            return _right(case, expected, partial(serve, streamed=Streamed(2)))
    with phased(seed, places=132) as serve, planted(module, function, edits):
        return _right(case, expected, serve)


def _right(case: GpuAttentionCase, expected: torch.Tensor, serve: Serve) -> bool:
    try:
        return gives(case, expected, serve)
    except AssertionError:  # of which a HandoverError is one
        return False
