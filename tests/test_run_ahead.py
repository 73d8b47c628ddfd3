"""Steps planned before the tokens of the last one are seen: the engine on ops that only pretend to be late.

The CPU's kernels stand in for those of a device with a queue, so that all that chaos can do is cheap to try.
Logits lie in one buffer that each step overwrites, as memory is reused behind a queue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from isobatch.engine import runner
from isobatch.engine.engine import Engine
from isobatch.engine.request import PENDING
from isobatch.engine.sampling_params import SamplingParams
from isobatch.errors import NonFiniteLogitsError
from isobatch.kernels.cpu.layout import CPU
from isobatch.kernels.layout import PagedRows
from isobatch.models.decoder import Decoder
from isobatch.ops.queued import QueuedOps
from tests.engine_harness import (
    POISON,
    Ask,
    MovedError,
    World,
    alone,
    drive,
    expect_same,
    fixed_asks,
    stream,
    tiny_world,
)


class LateOps(QueuedOps):
    """The CPU's kernels, with logits that do not stay."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__("isobatch", decoder.ops._table, CPU)
        self._buffer = torch.empty(512, decoder.config.vocab_size)

    def logits(self, x: torch.Tensor, weight: Any) -> torch.Tensor:
        shown = self._buffer[: len(x)]
        return shown.copy_(super().logits(x, weight))

    def fetch(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        copy = tensor.clone()
        return lambda: copy

    def send(self, numbers: torch.Tensor, to: torch.Tensor) -> None:
        to.copy_(numbers)

    def fill_in(
        self, known: torch.Tensor, places: torch.Tensor, sampled: torch.Tensor, to: torch.Tensor
    ) -> None:
        raise NotImplementedError("as decode_rows")

    def decode_rows(
        self, lengths: torch.Tensor, tables: torch.Tensor, slots: torch.Tensor, context: int
    ) -> PagedRows:
        raise NotImplementedError("recordings are tried with the GPU's kernels, in tests/test_gpu_engine.py")

    def recorded(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        raise NotImplementedError("as decode_rows")


@cache
def late_world(*, poisoned: bool = False) -> World:
    world = tiny_world(poisoned=poisoned)
    return replace(world, decoder=replace(world.decoder, ops=LateOps(world.decoder)))


def late(*, poisoned: bool = False, **settings: Any) -> Engine:
    engine = late_world(poisoned=poisoned).engine(**settings)
    engine._runner._decode = None
    return engine


def free_asks() -> tuple[Ask, ...]:
    """Those whose tokens do not depend on the tokens before: nobody need wait for them."""
    return tuple(replace(ask, params=replace(ask.params, repetition_penalty=1)) for ask in fixed_asks())


def expect_alone(asks: tuple[Ask, ...], engine: Engine, **load: Any) -> None:
    for ask, reply in zip(asks, drive(engine, asks, **load), strict=True):
        expect_same(reply, alone(tiny_world(), ask), "run ahead")


def test_engine_does_run_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    launch = runner.Runner.launch

    def watched(self: Any, step: Any, before: Any = None) -> Any:
        seen.append(any(chunk.token_ids[-1] == PENDING for chunk in step.chunks))
        return launch(self, step, before)

    monkeypatch.setattr(runner.Runner, "launch", watched)
    asks = (Ask(stream(1)[:9], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)),)
    expect_alone(asks, late())
    # The reply's six steps, and no seventh for a token too many; then those of the engine that waits.
    assert seen == [False, *[True] * 5, *[False] * 6]


LOADS: dict[str, dict[str, Any]] = {
    "together": {},
    "few tokens a step": {"max_batch_tokens": 9},
    "few sequences": {"max_batch_sequences": 2},
    "few blocks": {"blocks": 32, "prefix_cache": False},
    "few blocks, cached": {"blocks": 32},
    **{f"chaos {seed}": {"policy": f"chaos:{seed}", "max_batch_tokens": 48} for seed in range(6)},
}


@pytest.mark.parametrize("asks", [free_asks(), fixed_asks()], ids=["free", "some penalised"])
@pytest.mark.parametrize("load", LOADS)
def test_reply_is_that_of_an_engine_that_waits(load: str, asks: tuple[Ask, ...]) -> None:
    engine = late(**LOADS[load])
    expect_alone(asks, engine, arrivals=[i % 5 for i in range(len(asks))])
    expect_alone(asks, engine)  # and once more, over a warm cache


def test_aborted_and_failed_requests_leave_the_others_alone() -> None:
    fine = free_asks()[:4]
    bad = Ask((*stream(2)[:7], POISON), SamplingParams(temperature=0, max_tokens=5))
    engine = late(poisoned=True)
    replies = drive(engine, (*fine, bad, fine[0]), arrivals=[0, 1, 2, 3, 1, 0], aborts={5: 3})
    for ask, reply in zip(fine, replies, strict=False):
        expect_same(reply, alone(tiny_world(), ask), "beside an abort and a failure")
    assert replies[4] is not None
    assert isinstance(replies[4].error, NonFiniteLogitsError)


def test_prefix_of_a_request_that_is_about_to_fail_fails_alike() -> None:
    """Its blocks may be found in the step before that is known; whoever finds them has the same tokens."""
    bad = Ask((*stream(2)[:30], POISON, *stream(2)[:9]), SamplingParams(temperature=0, max_tokens=5))
    expected = alone(tiny_world(poisoned=True), bad)
    assert isinstance(expected.error, NonFiniteLogitsError)
    engine = late(poisoned=True)
    for reply in drive(engine, (bad,) * 4, arrivals=range(4)):
        expect_same(reply, expected, "beside its like")
    fine = free_asks()[0]
    expect_same(drive(engine, (fine,))[0], alone(tiny_world(), fine), "after failures")


def test_interruption_while_a_step_is_under_way_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = free_asks()[0]
    engine = late()
    engine.add(ask.prompt, ask.params)
    engine.step()
    with monkeypatch.context() as broken:
        broken.setattr(Engine, "_take_all", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    replies = []
    while engine.has_work:
        replies += engine.step()
    expect_same(replies[0], alone(tiny_world(), ask), "after an interruption")


def test_control_a_token_of_another_row_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    places = runner.Flight.sampled

    def mixed(self: runner.Flight) -> dict[int, int]:
        found = places(self)
        return dict(zip(found, reversed(found.values()), strict=True))

    monkeypatch.setattr(runner.Flight, "sampled", mixed)
    with pytest.raises(MovedError):
        expect_alone(free_asks(), late())


def test_control_logits_read_too_late_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LateOps, "fetch", lambda _self, tensor: lambda: tensor)
    with pytest.raises(MovedError):
        expect_alone(free_asks(), late())
