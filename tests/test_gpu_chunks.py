"""Small steps with chunks, recorded: on a GPU where there is one, else under Triton's interpreter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from isobatch import SamplingParams
from isobatch.engine import graph_inputs
from isobatch.engine.chunk_graphs import ChunkGraphs
from isobatch.engine.graph_inputs import PLACES, GraphInputs
from isobatch.engine.graphs import Computed
from isobatch.kernels.attention.gpu_serve import Tiling
from isobatch.kernels.gpu.device import INTERPRETED
from isobatch.ops.gpu import GpuOps
from tests.engine_harness import Ask, MovedError, drive, expect_same, stream
from tests.test_gpu_engine import engine
from tests.test_gpu_ladder import eager

# Stale memory is NaN, and NumPy, which interprets, says so where it is masked.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

# Nobody is penalised: so every step is planned before the tokens of the last one are seen. Of each the logits
# are compared, too, by digests or figures: a wrong key may leave a token what it was.
ASKS = tuple(
    Ask(stream(number)[:length], SamplingParams(max_tokens=3, ignore_eos=True, seed=number, **how))
    for number, length, how in (
        (0, 6, {"temperature": 1, "receipt": True}),
        (1, 11, {"temperature": 0, "logprobs": 2, "prompt_logprobs": 1}),
        (2, 7, {"temperature": 1, "top_p": 0.8, "receipt": True}),
    )
)
LONG = tuple(
    Ask(stream(number)[:length], SamplingParams(max_tokens=9, temperature=1, seed=number, ignore_eos=True))
    for number, length in enumerate((1, 15, 16, 17, 31, 33, 60, 65, 100, 129, 200, 255, 40, 40, 40))
)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many steps with chunks were recorded, how many of them with pending tokens, and how many not."""
    seen: Counter[str] = Counter()
    run = ChunkGraphs.run

    def ran(self: ChunkGraphs, step: Any, pending: Any = None) -> Computed | None:
        computed = run(self, step, pending)
        seen["queued" if computed is None else "recorded" if pending is None else "pending"] += 1
        return computed

    monkeypatch.setattr(ChunkGraphs, "run", ran)
    return seen


def expect_eager(asks: Sequence[Ask], where: str, arrivals: Sequence[int], **settings: Any) -> None:
    busy = engine(**settings)
    graphs = busy._runner._chunks
    assert graphs is not None
    if INTERPRETED:  # no time to wait until every size has come before
        graphs._seen.update((16, 2**at, singles) for at in range(4, 8) for singles in (False, True))
    for at in range(1 if INTERPRETED else 2):
        for ask, reply in zip(asks, drive(busy, asks, arrivals=arrivals), strict=True):
            expect_same(reply, eager(ask), f"{where}, time {at}")


LOADS: dict[str, dict[str, Any]] = {
    "whole prompts": {"prefix_cache": False},
    "pieces": {"max_batch_tokens": 5},
    "short of blocks": {"max_batch_tokens": 6, "blocks": 3, "prefix_cache": False},
    "chaos": {"policy": "chaos:4", "max_batch_tokens": 9},
}


@pytest.mark.parametrize("load", LOADS)
def test_recorded_chunks_are_eager_ones_alone(load: str, steps: Counter[str]) -> None:
    expect_eager(ASKS, load, (0, 1, 2), **LOADS[load])
    assert steps["recorded"] > 0
    assert steps["pending"] > 0


def test_size_is_recorded_when_it_comes_again(steps: Counter[str]) -> None:
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    busy = engine(prefix_cache=False)
    for number in range(3):
        drive(busy, [Ask(stream(number)[: 5 + number], params)])
    assert steps == {"queued": 1, "recorded": 2}


@pytest.mark.skipif(INTERPRETED, reason="no GPU: the interpreter would take an hour")
@pytest.mark.parametrize("budget", [17, 64, 65, 130, 300, 1000, 1025, 4096])
def test_recorded_chunks_of_every_size(budget: int, steps: Counter[str]) -> None:
    settings = {"max_batch_tokens": budget, "blocks": 400, "prefix_cache": False}
    expect_eager(LONG, str(budget), range(len(LONG)), **settings)
    expect_eager(LONG * 9, f"{budget}, many", [at % 7 for at in range(9 * len(LONG))], **settings)
    assert steps["pending"] > 0
    if budget <= 1000:
        assert steps["recorded"] + steps["pending"] > steps["queued"]


def test_drafts_among_chunks_are_recorded(steps: Counter[str]) -> None:
    asks = tuple(replace(ask, prompt=ask.prompt[:3] * 4) for ask in ASKS[:2])
    expect_eager(asks, "drafts", (0, 2), draft_tokens=3, max_batch_tokens=9)
    assert steps["recorded"] > 0


def expect_caught(steps: Counter[str]) -> None:
    with pytest.raises(MovedError):
        expect_eager(ASKS, "a fault", (0, 1, 2), max_batch_tokens=7, prefix_cache=False)
    assert steps["recorded"] + steps["pending"] > 0


def test_control_padded_rows_that_write_are_caught(
    steps: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_inputs, "NOWHERE", 0)
    expect_caught(steps)


@pytest.mark.parametrize("which", ["tiles", "singles"])
def test_control_another_sequence_in_its_place_is_caught(
    which: str, steps: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = Tiling.cut

    def mixed(self: Tiling, queries: Any, contexts: Any) -> tuple[list[int], list[int], list[int]]:
        requests, firsts, singles = cut(self, queries, contexts)
        others = [(r + 1) % len(queries) for r in (requests if which == "tiles" else singles)]
        return (others, firsts, singles) if which == "tiles" else (requests, firsts, others)

    monkeypatch.setattr(Tiling, "cut", mixed)
    expect_caught(steps)


def test_single_queries_have_no_tiles_where_decode_can_serve_them() -> None:
    requests, firsts, singles = Tiling(8, 2, 64).cut((1, 40, 1, 0, 1), (9, 40, 700, 0, 1))
    assert singles == [0, 2, 4]
    assert set(requests) == {1}
    assert sorted(firsts) == [0, 64, 128]
    for heads, head_size in ((34, 64), (8, 256)):  # what decode's kernels do not take
        assert Tiling(heads, 2, head_size).cut((1, 1), (9, 9))[2] == []


def test_control_pending_tokens_that_are_forgotten_are_caught(
    steps: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    send = GraphInputs.send
    monkeypatch.setattr(
        GraphInputs, "send", lambda self, form, numbers: send(self, form, numbers | {PLACES: []})
    )
    expect_caught(steps)


class _BeforeReplays(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What is done last before each replay: "filled in", or what torch did after that."""

    last: str | None = None

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.last = str(function)
        return function(*args, **kwargs or {})


def _last_before_replays(steps: Counter[str], monkeypatch: pytest.MonkeyPatch) -> set[str | None]:
    mode, seen = _BeforeReplays(), set()  # type: ignore[no-untyped-call]
    fill_in, recorded = GpuOps.fill_in, GpuOps.recorded

    def filled(ops: GpuOps, *arguments: Any) -> None:
        fill_in(ops, *arguments)
        mode.last = "filled in"

    def watched(ops: GpuOps, work: Any) -> Any:
        replay, result = recorded(ops, work)

        def told() -> object:
            seen.add(mode.last)
            return replay()

        return told, result

    monkeypatch.setattr(GpuOps, "fill_in", filled)
    monkeypatch.setattr(GpuOps, "recorded", watched)
    with mode:
        expect_eager(ASKS, "watched", (0, 1, 2), max_batch_tokens=5)
    assert steps["recorded"]
    assert steps["pending"]
    return seen


def test_tokens_are_filled_in_by_the_last_launch_before_a_replay(
    steps: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain launch in between would leave the GPU slow for the step (kernels/gpu/tokens.py)."""
    assert _last_before_replays(steps, monkeypatch) == {"filled in"}


def test_control_a_launch_after_tokens_are_filled_in_is_seen(
    steps: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_in = GraphInputs.fill_in

    def late(self: GraphInputs, form: Any, sampled: Any) -> None:
        fill_in(self, form, sampled)
        self.token_ids(form).clamp_(min=0)

    monkeypatch.setattr(GraphInputs, "fill_in", late)
    assert _last_before_replays(steps, monkeypatch) == {"aten.clamp_.default"}
