"""The checks of `test_gpu_attention.py`, to be run alone: python -m tests.gpu_attention_checks NAME ..."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import torch

from isobatch.bits import bits_equal
from isobatch.kernels.attention import triton, triton_again, triton_phases, triton_steps
from isobatch.kernels.attention.gather import gather
from isobatch.kernels.attention.gpu_record import (
    ATTENTION_GPU,
    GPU_ATTENTION,
    GpuAttentionCase,
    draw,
    numbers,
)
from isobatch.kernels.attention.gpu_rows import GpuKVCache, GpuPagedRows, cut
from isobatch.kernels.attention.gpu_serve import batches
from isobatch.kernels.attention.padded import into_batch, out_of_batch, planned
from isobatch.kernels.attention.triton import Tile, attention_row, attention_tiled
from isobatch.kernels.attention.triton_again import PIECE_ROWS, attention_again
from isobatch.kernels.attention.triton_decode import Down, attention_down
from isobatch.kernels.attention.triton_phases import attention_phases
from isobatch.kernels.attention.triton_write import write_kv
from isobatch.kernels.bitclass import certify
from isobatch.kernels.gpu.device import INTERPRETED, device, dtypes, gluon_runs
from isobatch.kernels.layout import PAGE, PagedRows
from isobatch.kernels.registry import Member
from tests import interpreter

ROWS = (9,)
MEMBERS = ATTENTION_GPU.members
VARIANT = ATTENTION_GPU.variants[0]
_PHASES = Member("phases", attention_phases, GPU_ATTENTION)


def members_agree() -> None:
    for member in MEMBERS[1:]:
        verdict = certify(ATTENTION_GPU, member, ROWS)
        assert verdict.member, str(verdict)


def a_row_alone_is_the_row_in_its_chunk() -> None:
    case = draw("alone", 9, VARIANT)
    for member in MEMBERS:
        together = case.call(member)[0]
        for row in (0, 8):
            assert bits_equal(case.take([row]).call(member)[0], together[row : row + 1]), member.name
        assert bits_equal(case.take(range(8, -1, -1)).call(member)[0], together.flip(0)), member.name


def blocks_and_stale_memory_are_free() -> None:
    case = draw("layout", 9, VARIANT)
    for member in MEMBERS:
        assert bits_equal(case.call(member)[0], case.relayout().call(member)[0]), member.name


def later_and_other_requests_nan_is_inert() -> None:
    case = draw("inert", 9, VARIANT)
    for member in MEMBERS:
        together = case.call(member)[0]
        for keep in ([0], [3, 7]):
            for value in (float("nan"), float("inf")):
                got = case.poison(keep, value).call(member)[0]
                assert bits_equal(got[keep], together[keep]), (member.name, keep, value)


def a_seen_infinity_is_what_the_sum_gives() -> None:
    case = draw("seen", 9, VARIANT)
    v = case.v.clone()
    length = v.shape[1]
    for request in range(3):
        # Each column its own mixture: two infinities of one sign, one, a NaN, two that make NaN.
        for column, value in enumerate((float("inf"), float("-inf"), float("nan"), float("inf"))):
            v[request, length // 2 + 5 * column, :, column] = value
        v[request, length - 3, :, 3] = float("-inf")
        v[request, length - 3, :, 0] = float("inf")
    queries = (*((0, p) for p in range(length - 9, length)), (1, length // 2 + 1), (2, length - 1))
    case = replace(case, v=v, queries=queries)
    expected = case.call(MEMBERS[0])[0]
    assert not torch.isfinite(expected).all()
    for member in MEMBERS[1:]:
        got = case.call(member)[0]
        both = torch.isnan(got) & torch.isnan(expected)  # the interpreter's NaN have signs
        assert torch.equal(got.masked_fill(both, 0), expected.masked_fill(both, 0)), member.name


def padded_requests_are_inert_and_zero() -> None:
    case = draw("padded", 3, VARIANT)
    case = replace(case, queries=((0, 5), (1, 200), (2, 130)))

    def padded(
        q: torch.Tensor, cache: GpuKVCache, rows: GpuPagedRows, scale: float, run: Any
    ) -> torch.Tensor:
        lengths = rows.context_lengths.clone()
        lengths[1] = 0
        # In a graph the plain ints are bounds, and tables hold anything that is a block.
        rows = replace(rows, context_lengths=lengths, contexts=(256,) * 3, settled=False, _made={})
        out: torch.Tensor = run(q, cache, rows, scale)
        return out

    # Among tiles in a list a padded request is one without queries, and has none.
    for member in (member for member in MEMBERS[2:] if member.name != "listed"):
        expected = case.call(member)[0]
        run = lambda q, cache, rows, scale, m=member: padded(q, cache, rows, scale, m.function)  # noqa: E731
        got = case.call(Member("padded", run, GPU_ATTENTION))[0]
        assert bits_equal(got[[0, 2]], expected[[0, 2]]), member.name
        assert bits_equal(got[1], torch.zeros_like(got[1])), member.name


def requests_without_queries_are_inert() -> None:
    """Whoever asks for all requests gets it right, whatever lengths lie on the device of those without."""
    case = replace(draw("idle", 2, VARIANT), queries=((0, 5), (2, 130)))
    decodes: dict[str, Any] = {
        "tiles": partial(attention_tiled, tile=Tile(16, 1, 1, packed=True)),
        "down": partial(attention_down, down=Down(1, 1)),
        "phases": attention_phases,
    }
    if gluon_runs():
        from isobatch.kernels.attention.gluon_decode import Streamed, attention_streamed

        decodes["phases without Gluon"] = partial(attention_phases, fed=False)
        decodes["streamed"] = partial(attention_streamed, streamed=Streamed())

    def among(run: Any) -> Any:
        def call(q: torch.Tensor, cache: GpuKVCache, rows: GpuPagedRows, scale: float) -> torch.Tensor:
            lengths = rows.context_lengths.tolist()
            rows = replace(
                rows,
                query_starts=GpuPagedRows.upload([0, 1, 2, 2]),
                context_lengths=GpuPagedRows.upload([*lengths, 700]),
                block_tables=torch.cat((rows.block_tables, rows.block_tables[:1])).repeat(1, 8),
                queries=(1, 1, 0),
                contexts=(*lengths, 0),
                settled=False,
                _made={},
            )
            out = torch.empty_like(q)
            with guarded() as kept:
                run(q, cache, rows, scale, out=out)
            assert kept(), "wrote beyond the memory that it asked for"
            return out

        return call

    expected = case.call(MEMBERS[0])[0]
    for name, run in decodes.items():
        assert bits_equal(case.call(Member(name, among(run), GPU_ATTENTION))[0], expected), name


@contextmanager
def guarded() -> Iterator[Callable[[], bool]]:
    """Puts a guard behind all memory that is asked for; what it gives says whether all guards are whole."""
    guards, plain = [], torch.empty

    def empty(*shape: int, **options: Any) -> torch.Tensor:
        size = math.prod(shape)
        memory = plain(size + 4096, **options)
        guards.append(memory[size:].fill_(7))
        return memory[:size].view(shape)

    with patch.object(torch, "empty", empty):
        yield lambda: all(bool((guard == 7).all()) for guard in guards)


def gathered_keys_are_copies() -> None:
    length = 70
    q, k, v = numbers("fresh", 1, length, 4, 2, 32, dtypes()[0])
    case = GpuAttentionCase(tuple((0, p) for p in range(length)), q, k, v)

    def look(q: torch.Tensor, cache: GpuKVCache, rows: GpuPagedRows, scale: float) -> torch.Tensor:
        key, value, _ = gather(cache, rows, (0,))
        assert bits_equal(key[:length], k[0])
        assert bits_equal(value[:length], v[0])
        return q

    case.call(Member("look", look, GPU_ATTENTION))


def a_batch_holds_whole_prompts_and_zeros() -> None:
    length, spans = 150, ((0, 150), (40, 60), (0, 1), (5, 149))
    q, k, v = numbers("batch", len(spans), length, 5, 1, 48, dtypes()[0])
    queries = tuple((r, p) for r, span in enumerate(spans) for p in range(*span))
    case = GpuAttentionCase(queries, q, k, v, fill=float("nan"))
    chosen = (0, 1, 3)

    def look(q: torch.Tensor, cache: GpuKVCache, rows: GpuPagedRows, scale: float) -> torch.Tensor:
        q = torch.cat((q, torch.full_like(q[:, :1], 7)), 1)[:, :-1]  # in the engine keys are beside it
        tables = rows.block_tables.clone()
        for r, (_, end) in enumerate(spans):
            tables[r, -(-end // PAGE) :] = 2**30  # what lies beyond a request's pages is anything
        rows = replace(rows, block_tables=tables, settled=False, _made={})
        with guarded() as kept:
            batch, keys, values = into_batch(q, cache, rows, chosen)
        assert kept(), "wrote beyond the memory that it asked for"
        assert batch.shape[1] == keys.shape[1] == planned(length)
        for entry, r in enumerate(chosen):
            first, end = spans[r]
            for got, mine in ((keys, k), (values, v)):
                assert bits_equal(got[entry, :end], mine[r, :end])
                assert not got[entry, end:].any()
            assert bits_equal(batch[entry, first:end], case.q[r, first:end])
            assert not batch[entry, :first].any()
            assert not batch[entry, end:].any()
        out = torch.full_like(q, 7)
        out_of_batch(batch, out, rows, chosen)
        for r, begin in enumerate(rows.begins):
            own = slice(begin, begin + rows.queries[r])
            assert bits_equal(out[own], q[own] if r in chosen else torch.full_like(q[own], 7))
        return q

    case.call(Member("look", look, GPU_ATTENTION))


def rings_run_on_from_item_to_item() -> None:
    """Few programs for many items, some without keys or queries: nothing of one must reach the next."""
    from isobatch.kernels.attention import gluon_decode
    from isobatch.kernels.attention.gluon_decode import Streamed, attention_streamed

    ends = (1, 700, 127, 128, 1, 129, 256, 383, 17, 500)
    for D, G in ((64, 1), (96, 5), (128, 4), (128, 16)):
        q, k, v = numbers(f"rings/{D}/{G}", len(ends), max(ends), 2 * G, 2, D, dtypes()[0])
        case = GpuAttentionCase(tuple((r, end - 1) for r, end in enumerate(ends)), q, k, v, fill=float("nan"))
        expected = case.call(MEMBERS[0])[0]
        expected[4] = 0

        def run(
            q: torch.Tensor, cache: GpuKVCache, rows: GpuPagedRows, scale: float, streamed: Streamed
        ) -> torch.Tensor:
            """Request 4 is padded; one without queries is put in the middle."""
            middle = 6
            starts, lengths = rows.query_starts.tolist(), rows.context_lengths.tolist()
            lengths[4] = 0
            at = [*range(middle), middle - 1, *range(middle, len(ends))]
            rows = replace(
                rows,
                query_starts=GpuPagedRows.upload([*starts[: middle + 1], *starts[middle:]]),
                context_lengths=GpuPagedRows.upload([lengths[r] for r in at]),
                block_tables=rows.block_tables[at],
                queries=(*(1,) * middle, 0, *(1,) * (len(ends) - middle)),
                contexts=tuple(ends[r] for r in at),
                settled=False,
                _made={},
            )
            return attention_streamed(q, cache, rows, scale, streamed=streamed)

        for programs in (1, 2, 5, 132):
            for streamed in (Streamed(3), Streamed(2, registers=128), Streamed(1)):
                member = Member("rings", partial(run, streamed=streamed), GPU_ATTENTION)
                with patch.object(gluon_decode, "multiprocessors", lambda programs=programs: programs):
                    got = case.call(member)[0]
                assert bits_equal(got, expected), (D, G, programs, streamed)


def tables_that_come_right_before_are_seen() -> None:
    """A copy is waited for before a kernel begins, also by one that looks its tables up before it waits."""
    ends = (300, 129, 17)
    q, k, v = numbers("tables", len(ends), max(ends), 8, 2, 128, dtypes()[0])
    case = GpuAttentionCase(tuple((r, end - 1) for r, end in enumerate(ends)), q, k, v)
    expected = case.call(MEMBERS[0])[0]
    busy = torch.ones(4096, 4096, device=device())

    def copied(
        q: torch.Tensor, cache: GpuKVCache, rows: GpuPagedRows, scale: float, member: Member
    ) -> torch.Tensor:
        assert rows.settled
        stale = replace(rows, context_lengths=torch.ones_like(rows.context_lengths), _made={})
        lengths = torch.tensor(ends, dtype=torch.int32).pin_memory()
        torch.mm(busy, busy)
        stale.context_lengths.copy_(lengths, non_blocking=True)
        out: torch.Tensor = member.function(q=q, cache=cache, rows=stale, scale=scale)
        return out

    for name in ("streamed", "phases", "down, gathered"):
        member = Member(name, partial(copied, member=ATTENTION_GPU.member(name)), GPU_ATTENTION)
        for _ in range(20):
            assert bits_equal(case.call(member)[0], expected), name


def runs_of_blocks_are_handed_over() -> None:
    """The chain of the phases: contexts that end in and at each block of a run, and beyond the rings."""
    ends = (1, 128, 129, 256, 300, 384, 500, 512, 513, 1024, 1500, 1536, 1537, 2049)
    for D, G in ((64, 1), (96, 5), (128, 4), (128, 16)):
        q, k, v = numbers(f"runs/{D}/{G}", 1, max(ends), G, 1, D, dtypes()[0])
        case = GpuAttentionCase(tuple((0, end - 1) for end in ends), q, k, v, fill=float("nan"))
        for row in range(len(ends)):
            alone = case.take([row])
            expected = alone.call(MEMBERS[0])[0]
            for places in (1, 8, 132):
                with patch.object(triton_phases, "multiprocessors", lambda places=places: places):
                    assert bits_equal(alone.call(_PHASES)[0], expected), (D, G, ends[row], places)


def scores_that_come_late_are_waited_for() -> None:
    """Many runs, unequal requests, layers that share their counts, and a recording that is replayed."""
    ends = (16_384, 40_000, 16_385, 1, 5000)
    for D, G in ((128, 4), (128, 16), (64, 2)):
        random_ = torch.Generator(device()).manual_seed(D + G)
        shapes = ((len(ends), max(ends), heads, D) for heads in (2 * G, 2, 2))
        q, k, v = (torch.randn(s, generator=random_, device=device()).to(dtypes()[0]) for s in shapes)
        case = GpuAttentionCase(tuple((r, end - 1) for r, end in enumerate(ends)), q, k, v)
        expected = case.call(MEMBERS[0])[0]
        assert not bits_equal(_nobody_waits(case), expected), (D, G)
        for places in (12, 40, 132):
            with patch.object(triton_phases, "multiprocessors", lambda places=places: places):
                run = case.prepare(_PHASES)
                for _layer in range(3):
                    assert bits_equal(run()[0], expected), (D, G, places)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph), patch.object(torch, "empty", _poisoned):
                    layers = [run()[0] for _ in range(3)]
            for _ in range(100):
                for got in layers:
                    got.zero_()
                graph.replay()
                assert all(bits_equal(got, expected) for got in layers), (D, G, places)


def _poisoned(*shape: int, plain: Any = torch.empty, **options: Any) -> torch.Tensor:
    """Memory that is wrong in each layer and replay, where else it would be as the one before left it."""
    return plain(*shape, **options).fill_(float("nan"))  # type: ignore[no-any-return]


def _nobody_waits(case: GpuAttentionCase) -> torch.Tensor:
    """The control: what comes out where all scores are counted beforehand, which at first are NaN.

    Recorded, because launched one by one the scores are there before the chain is.
    """

    def counted(_rows: GpuPagedRows, *shape: int) -> torch.Tensor:
        return torch.full(shape, triton_phases.RUN, dtype=torch.int32, device=device())

    with (
        patch.object(triton_phases, "_counts", counted),
        patch.object(triton_phases, "multiprocessors", lambda: 12),
        patch.object(torch, "empty", _poisoned),
    ):
        run = case.prepare(_PHASES)
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()[0]
        graph.replay()
    return out


def spoilt_pieces_alone_are_computed_again() -> None:
    """Whether a program has one piece to look through, some, or all of them."""
    ends, heads = (200, 130, 1, 65), 4
    q, k, v = numbers("again", len(ends), max(ends), heads, 2, 64, dtypes()[0])
    case = GpuAttentionCase(tuple((r, p) for r, end in enumerate(ends) for p in range(end)), q, k, v)
    expected = case.call(MEMBERS[0])[0]

    def run(
        q: torch.Tensor, cache: GpuKVCache, rows: GpuPagedRows, scale: float, spoils: Callable[[int], bool]
    ) -> torch.Tensor:
        tiles = cut(rows.queries, rows.contexts, range(len(ends)), 1, 128)
        spoilt, wanted = torch.zeros(len(tiles[0]), heads, 128, dtype=torch.int8), torch.full_like(q, 7)
        pieces = product(range(len(tiles[0])), range(heads), range(0, 128, PIECE_ROWS))
        for number, (tile, head, row) in enumerate(pieces):
            request, first = tiles[0][tile], tiles[1][tile] + row
            count = min(PIECE_ROWS, rows.queries[request] - first)
            if count > 0 and spoils(number):
                spoilt[tile, head, row + number % count] = 1
                own = slice(rows.begins[request] + first, rows.begins[request] + first + count)
                wanted[own, head] = expected[own, head]
        out = torch.full_like(q, 7)
        attention_again(q, cache, rows, scale, rows.upload([*tiles]), spoilt.to(q.device), out=out)
        assert bits_equal(out, wanted)
        return out

    for programs in (1, 3, 132):
        for spoils in (lambda n: n in {3, 4, 13, 130}, lambda n: n % 3 > 0, lambda _: False):
            with patch.object(triton_again, "multiprocessors", lambda programs=programs: programs):
                case.call(Member("again", partial(run, spoils=spoils), GPU_ATTENTION))


def lengths_that_are_planned_are_few() -> None:
    lengths = [planned(n) for n in range(1, 8193)]
    assert all(n <= length <= max(n + 127, n * 9 // 8) for n, length in enumerate(lengths, 1))
    assert len({length for length in lengths if length > 1024}) == 24
    assert all(planned(length) == length for length in lengths)


def requests_in_a_batch_are_nearly_as_long() -> None:
    assert batches((1024,) * 8, range(8)) == [tuple(range(8))]
    assert batches((300, 4000, 1, 3900), (0, 1, 3)) == [(1, 3), (0,)]
    assert batches((), ()) == []


def variant_kernels_are_refused() -> None:
    """A split of the keys, and torch's own order, must be refused.

    A row sum in another order moves the last bit of float32, which sixteen bits seldom show on so few
    outputs: that control belongs on the device.
    """
    assert not certify(ATTENTION_GPU, Member("split", _split_keys, GPU_ATTENTION), ROWS).member
    assert not certify(ATTENTION_GPU, ATTENTION_GPU.stock, ROWS).member
    if INTERPRETED:  # where a part of a kernel can be replaced
        assert not certify(ATTENTION_GPU, Member("unscaled", _unscaled, GPU_ATTENTION), ROWS).member


def _unscaled(q: torch.Tensor, cache: GpuKVCache, rows: GpuPagedRows, scale: float) -> torch.Tensor:
    """What was summed before a maximum moved is left as it was."""

    def faulty(*arguments: Any) -> tuple[Any, ...]:
        p, alpha, m, lanes = triton_steps.softmax_block(*arguments)
        return p, alpha * 0 + 1, m, lanes

    with patch.object(triton, "softmax_block", faulty):
        return attention_tiled(q, cache, rows, scale, tile=Tile(16, 1, 1, packed=True))


def maxima_move_in_some_blocks_and_not_in_others() -> None:
    """Where none ever moves after the first block, nobody who forgets to rescale is found."""
    for variant in ATTENTION_GPU.variants:
        case = draw("maxima", 1, variant)
        last, group = case.q[2, -1].double(), case.q.shape[2] // case.k.shape[2]
        scores = torch.einsum("hd,jhd->hj", last, case.k[2].double().repeat_interleave(group, 1))
        tops = scores.view(len(scores), -1, 128).amax(2).cummax(1).values
        moves = tops[:, 1:] > tops[:, :-1]
        assert moves.any(1).all(), variant
        assert INTERPRETED or not moves.all(1).any(), variant  # the interpreter's contexts are two blocks


def _split_keys(q: torch.Tensor, cache: GpuKVCache, rows: GpuPagedRows, scale: float) -> torch.Tensor:
    """Keys in spans of 64, each summed alone, the sums then added: what a split by load makes of them."""
    out = torch.empty_like(q)
    page, begins = cache.k.shape[2], rows.begins
    for r, n in enumerate(rows.queries):
        context = rows.contexts[r]
        table = rows.block_tables[r, : -(-context // page)].long()
        k, v = (t[table].transpose(0, 1).flatten(1, 2)[:, :context].float() for t in (cache.k, cache.v))
        own = q[begins[r] : begins[r] + n].float().transpose(0, 1)
        group = own.shape[0] // k.shape[0]
        s = own.double() @ k.double().repeat_interleave(group, 0).transpose(1, 2) * scale
        at = torch.arange(context, device=q.device)
        s = s.masked_fill(at > (context - n + at[:n])[:, None], float("-inf")).float()
        p = torch.exp2((s - s.amax(-1, keepdim=True)) * 1.442695)
        parts = [
            p[..., a : a + 64].to(q.dtype).float() @ v.repeat_interleave(group, 0)[:, a : a + 64]
            for a in range(0, context, 64)
        ]
        total = torch.stack(parts).nan_to_num().sum(0) / p.sum(-1, keepdim=True)
        out[begins[r] : begins[r] + n] = total.transpose(0, 1).to(q.dtype)
    return out


def head_sizes_and_groups() -> None:
    for H, Hkv, D in ((5, 1, 64), (4, 4, 16), (2, 1, 96), (17, 1, 16)):
        q, k, v = numbers(f"{H}/{Hkv}/{D}", 1, 140, H, Hkv, D, dtypes()[0])
        case = GpuAttentionCase(((0, 137), (0, 138), (0, 139), (0, 20)), q, k, v)
        expected = case.call(MEMBERS[0])[0]
        for member in MEMBERS[1:]:
            assert bits_equal(case.call(member)[0], expected), (member.name, H, Hkv, D)


def write_kv_takes_any_strides() -> None:
    _, k, v = numbers("write", 1, 40, 2, 3, 24, dtypes()[0])
    wide = torch.full((40, 7, 24), float("nan"), dtype=k.dtype, device=device())
    wide[:, 1:4], wide[:, 4:] = k[0], v[0]
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(3))[:40].to(device())
    slots[7] = -1  # a padded row
    cache = GpuKVCache.empty(4, 3, 24, k.dtype)
    cache.k.zero_()
    cache.v.zero_()
    write_kv(wide[:, 1:4], wide[:, 4:], cache, PagedRows(slots, slots, slots, slots))
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            assert bits_equal(cache.k[slot // 16, :, slot % 16], k[0, t])
            assert bits_equal(cache.v[slot // 16, :, slot % 16], v[0, t])
    assert int((cache.k != 0).any(-1).any(1).sum()) == 39


if __name__ == "__main__":
    if INTERPRETED:
        interpreter.install()
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy, where an inert row divides zero by zero
    for wanted in sys.argv[1:]:
        globals()[wanted]()
    assert attention_row is MEMBERS[0].function
