"""Drafts on the GPU's kernels: on a GPU where there is one, else under Triton's interpreter."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from isobatch import SamplingParams
from isobatch.engine.batch import LogitRow
from isobatch.engine.block_tables import BlockTables
from isobatch.engine.drafts import Drafter
from isobatch.engine.engine import Engine
from isobatch.engine.graphs import DecodeGraphs
from isobatch.engine.output import Reply
from isobatch.engine.runner import Runner
from isobatch.engine.scheduled import ScheduledStep
from tests.engine_harness import Ask, MovedError, drive, expect_same, stream
from tests.test_gpu_engine import ASKS as SHORT
from tests.test_gpu_engine import engine
from tests.test_speculation import Prompter, expect_both

# Stale memory is NaN, and NumPy, which interprets, says so where it is masked.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

ASKS = tuple(replace(ask, params=replace(ask.params, max_tokens=7)) for ask in SHORT)


@cache
def replies() -> tuple[Reply, ...]:
    each = tuple(drive(engine(prefix_cache=False), [ask])[0] for ask in ASKS)
    assert None not in each
    return each  # type: ignore[return-value]


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Steps with drafts, recorded or not, with the replies' own tokens as drafts, some of them wrong."""
    prompter = Prompter(replies(), 4, lambda chance: chance.randrange(101))
    monkeypatch.setattr(Drafter, "propose", lambda drafter, most: prompter(drafter, most))
    seen: Counter[str] = Counter()
    launch, run = Runner.launch, DecodeGraphs.run

    def launched(self: Runner, step: ScheduledStep, before: Any = None) -> Any:
        seen["all"] += any(chunk.drafts for chunk in step.chunks)
        return launch(self, step, before)

    def ran(self: DecodeGraphs, step: ScheduledStep, *rest: Any) -> Any:
        seen["recorded"] += any(chunk.drafts for chunk in step.chunks)
        return run(self, step, *rest)

    monkeypatch.setattr(Runner, "launch", launched)
    monkeypatch.setattr(DecodeGraphs, "run", ran)
    return seen


def expect_alone(busy: Engine, where: str, **load: Any) -> None:
    for got, want in zip(drive(busy, ASKS, **load), replies(), strict=True):
        expect_same(got, want, where)


LOADS: dict[str, dict[str, Any]] = {
    "together": {"draft_tokens": 4},
    "chunked": {"draft_tokens": 3, "max_batch_tokens": 9},
    "chaotic": {"draft_tokens": 5, "policy": "chaos:5", "max_batch_tokens": 40},
    "short of blocks": {"draft_tokens": 4, "blocks": 4, "prefix_cache": False},
}


@pytest.mark.parametrize("load", LOADS)
def test_reply_is_that_without_drafts(load: str, kinds: Counter[str]) -> None:
    busy = engine(**LOADS[load])
    expect_alone(busy, load, arrivals=(0, 1, 2))
    expect_both(busy)
    assert kinds["recorded"] > 0
    if load == "chunked":  # a prompt goes beside drafts
        assert kinds["recorded"] < kinds["all"]


def test_drafts_that_are_looked_up_are_verified_in_recorded_steps() -> None:
    ask = Ask(stream(3)[:9] * 3, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=3))
    plain, drafting = engine(), engine(draft_tokens=4)
    (want,), (got,) = drive(plain, [ask]), drive(drafting, [ask])
    assert want is not None
    expect_same(got, want, "looked up")
    assert drafting.drafted_tokens


def test_control_tables_of_other_rows_are_caught(
    kinds: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    again = BlockTables.repeat

    def mixed(self: BlockTables, rows: list[int], start: int) -> None:
        again(self, [(row + 1) % start for row in rows], start)

    monkeypatch.setattr(BlockTables, "repeat", mixed)
    with pytest.raises(MovedError):
        expect_alone(engine(draft_tokens=4), "a fault")
    assert kinds["recorded"]


def test_control_draft_that_is_not_compared_is_caught(
    kinds: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LogitRow, "counts", property(lambda row: len(row.sequence) == row.position))
    with pytest.raises(MovedError):
        expect_alone(engine(draft_tokens=4), "a fault")
    assert kinds["recorded"]
