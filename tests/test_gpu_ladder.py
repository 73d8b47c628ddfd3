"""Recorded decode is eager decode at every edge of the ladder, and at the real layers of Qwen3-8B, on a GPU.

Under Triton's interpreter, where recording is running again, the first rungs are tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch

from isobatch import LLM, SamplingParams
from isobatch.engine import graph_inputs, sampler
from isobatch.engine.graph_inputs import PLACES, Form, GraphInputs
from isobatch.engine.graphs import DRAWN, Computed, DecodeGraphs, ladder
from isobatch.engine.output import Reply
from isobatch.kernels.gpu.device import INTERPRETED, device
from tests.engine_harness import Ask, MovedError, drive, expect_same, stream
from tests.test_gpu_engine import decoder, engine

# Stale memory is NaN, and NumPy, which interprets, says so where it is masked.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

_MOST = 2 if INTERPRETED else 1024
_RUNGS = ladder(_MOST)
# Both sides of each edge: a full rung, and one more than it holds, which is padded to the next.
EDGES = sorted({*_RUNGS, *(rung + 1 for rung in _RUNGS[:-1])})
# Whole prompts in the first step, so that every later one is a step of decode with all of them in it.
ASKS = tuple(
    Ask(
        stream(number)[: 3 + number],
        SamplingParams(max_tokens=3, ignore_eos=True, logprobs=2, temperature=number % 2, seed=number),
    )
    for number in range(2 if INTERPRETED else 7)
)
# Nobody wants to see logits, so that tokens are chosen in the recording.
UNSEEN = tuple(replace(ask, params=replace(ask.params, logprobs=None, max_tokens=6)) for ask in ASKS)
FILTERED = tuple(
    replace(ask, params=replace(ask.params, top_k=7 + at, top_p=0.9)) for at, ask in enumerate(UNSEEN)
)
GREEDY = tuple(replace(ask, params=replace(ask.params, temperature=0)) for ask in UNSEEN)


@cache
def eager(ask: Ask) -> Reply:
    """Alone, and with no recording: an observer sees each call."""
    with decoder().ops.observed(lambda *_call: None):
        (reply,) = drive(engine(prefix_cache=False), [ask])
    assert reply is not None
    return reply


def expect_eager(requests: int, recorded: list[tuple[int, bool]], asks: tuple[Ask, ...] = ASKS) -> None:
    """So many requests in recorded steps of just as many rows."""
    asks = tuple(asks[at % len(asks)] for at in range(requests))
    tokens = sum(len(ask.prompt) for ask in asks)
    busy = engine(
        blocks=2 * requests, prefix_cache=False, max_batch_sequences=requests, max_batch_tokens=tokens
    )
    for ask, reply in zip(asks, drive(busy, asks), strict=True):
        expect_same(reply, eager(ask), f"{requests} requests")
    drawn = asks[0].params.logprobs is None and requests <= DRAWN
    assert (requests, drawn) in recorded


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """How many rows each recorded step had, and whether its tokens were chosen in the recording."""
    seen: list[tuple[int, bool]] = []
    run = DecodeGraphs.run

    def ran(self: DecodeGraphs, step: Any, *rest: Any) -> Computed | None:
        computed = run(self, step, *rest)
        if computed is not None:
            seen.append((len(step.chunks), computed.logits is None))
        return computed

    monkeypatch.setattr(DecodeGraphs, "run", ran)
    return seen


def test_rungs_are_a_quarter_apart_at_most_and_hold_what_is_asked() -> None:
    for most in (1, 5, 63, 64, 1000, 1024, 5000):
        rungs = ladder(most)
        assert rungs[-1] >= most > (rungs[-2] if len(rungs) > 1 else 0)
        assert all(
            low < high <= max(low * 2 if low < 8 else low * 5 / 4, low + 8) for low, high in pairwise(rungs)
        )


@pytest.mark.parametrize("requests", EDGES)
def test_recorded_decode_is_eager_decode_alone(requests: int, recorded: list[tuple[int, bool]]) -> None:
    expect_eager(requests, recorded)


@pytest.mark.parametrize("asks", [UNSEEN, FILTERED, GREEDY], ids=["sampled", "filtered", "greedy"])
@pytest.mark.parametrize("requests", [edge for edge in EDGES if edge <= DRAWN + 1])
def test_tokens_chosen_in_a_recording_are_those_chosen_alone(
    requests: int, asks: tuple[Ask, ...], recorded: list[tuple[int, bool]]
) -> None:
    expect_eager(requests, recorded, asks)


def test_control_padded_rows_that_write_are_caught(
    recorded: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded rows that store their key and value where a real row has its own."""
    monkeypatch.setattr(graph_inputs, "NOWHERE", 0)
    with pytest.raises(MovedError):
        expect_eager(3, recorded)
    assert recorded


@pytest.mark.parametrize("name", ["seed", "position", "temperature"])
def test_control_sampling_with_the_numbers_of_another_row_is_caught(
    name: str, recorded: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = sampler.columns

    def turned(rows: Any) -> dict[str, list[float]]:
        found = columns(rows)
        return found | {name: [*found[name][1:], found[name][0]]}

    monkeypatch.setattr(sampler, "columns", turned)
    with pytest.raises(MovedError):
        expect_eager(3, recorded, UNSEEN)
    assert recorded


def test_control_pending_tokens_of_another_row_are_caught(
    recorded: list[tuple[int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    send = GraphInputs.send

    def mixed(self: GraphInputs, form: Form, numbers: Any) -> None:
        places = numbers.get(PLACES, [])
        send(self, form, numbers | {PLACES: [*places[1:], *places[:1]]})

    monkeypatch.setattr(GraphInputs, "send", mixed)
    with pytest.raises(MovedError):
        expect_eager(3, recorded, UNSEEN)
    assert recorded


@pytest.fixture(scope="module")
def layers() -> Iterator[list[Reply]]:
    """Two of Qwen3-8B's layers with random weights: replies alone."""
    llm = _real(prefix_cache=False)
    yield [llm.generate([prompt], params)[0] for prompt, params in _real_asks()]
    del llm
    torch.cuda.empty_cache()


def _real(**settings: Any) -> LLM:
    return LLM(
        "qwen3-8b",
        load="random",
        layers=2,
        device="cuda",
        kv_cache_bytes=1 << 30,
        max_context=4096,
        **settings,
    )


def _real_asks() -> list[tuple[list[int], SamplingParams]]:
    # Lengths on both sides of the rules' thresholds; one that repeats itself, for drafts.
    draws = torch.randint(0, 150_000, (6, 1400), generator=torch.Generator().manual_seed(5)).tolist()
    prompts = [
        draws[0][:7] * 40,
        *(draw[:n] for draw, n in zip(draws, (1, 100, 511, 513, 1400, 1024), strict=True)),
    ]
    return [
        (
            prompt,
            SamplingParams(temperature=at % 2, seed=at, max_tokens=40 + at, ignore_eos=True, logprobs=2),
        )
        for at, prompt in enumerate(prompts)
    ]


REAL_LOADS: dict[str, dict[str, Any]] = {
    "together": {},
    "chunks of 100": {"max_batch_tokens": 100},
    "drafts": {"draft_tokens": 4},
    "drafts in chunks": {"draft_tokens": 3, "max_batch_tokens": 130, "prefix_cache": False},
    "chaos": {"policy": "chaos:3", "max_batch_tokens": 700, "draft_tokens": 2},
}


@pytest.mark.skipif(INTERPRETED, reason="no GPU: the interpreter would take hours")
@pytest.mark.parametrize("load", REAL_LOADS)
def test_real_layers_give_the_reply_alone_under_any_load(load: str, layers: list[Reply]) -> None:
    assert device().type == "cuda"
    asks = _real_asks() * 3
    llm = _real(**REAL_LOADS[load])
    replies = llm.generate([prompt for prompt, _ in asks], [params for _, params in asks])
    for reply, want in zip(replies, layers * 3, strict=True):
        expect_same(reply, want, load)
