"""Memory that runs out in a step, and a GPU that fails: who is hurt, who is not, and what is said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from isobatch.engine.engine import Engine
from isobatch.engine.output import Reply
from isobatch.engine.runner import Runner
from isobatch.engine.sampling_params import SamplingParams
from isobatch.engine.scheduled import ScheduledStep
from isobatch.errors import DeviceError, StepMemoryError
from isobatch.ops import cuda
from tests.engine_harness import Ask, alone, drive, expect_same, fixed_asks, stream, tiny_world
from tests.test_gpu_engine import ASKS as GPU_ASKS
from tests.test_gpu_engine import alone as gpu_alone
from tests.test_gpu_engine import engine as gpu_engine
from tests.test_run_ahead import free_asks, late

Fault = Callable[[ScheduledStep], Exception | None]


def tokens(step: ScheduledStep) -> int:
    return sum(chunk.end - chunk.start for chunk in step.chunks)


def waits(**settings: Any) -> Engine:
    return tiny_world().engine(**settings)


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[Fault], list[int]]:
    """Plants a fault in the computation of steps; returns the sizes of those that it hits."""

    def planted(fault: Fault) -> list[int]:
        hit: list[int] = []
        compute = Runner._compute

        def computed(self: Runner, step: ScheduledStep, *rest: Any) -> Any:
            result = compute(self, step, *rest)  # most of it has been done when memory runs out
            if (error := fault(step)) is not None:
                hit.append(tokens(step))
                raise error
            return result

        monkeypatch.setattr(Runner, "_compute", computed)
        return hit

    return planted


def larger_than(most: int) -> Fault:
    return lambda step: torch.OutOfMemoryError("CUDA out of memory") if tokens(step) > most else None


@pytest.mark.parametrize(
    ("make", "asks"), [(waits, fixed_asks()), (late, free_asks())], ids=["waits", "late"]
)
@pytest.mark.parametrize("most", [1, 6, 40])
def test_step_that_does_not_fit_is_cut_down(
    most: int, make: Callable[..., Engine], asks: tuple[Ask, ...], plant: Callable[[Fault], list[int]]
) -> None:
    expected = [alone(tiny_world(), ask) for ask in asks]
    hit = plant(larger_than(most))
    engine = make(draft_tokens=2 if make is waits else 0)
    for want, reply in zip(expected, drive(engine, asks, arrivals=range(len(asks))), strict=True):
        expect_same(reply, want, f"at most {most} tokens")
    assert hit
    assert min(hit) > most
    engine.scheduler.check()
    # What took the memory may be gone when there is work again.
    engine.add(asks[0].prompt, asks[0].params)
    assert engine.scheduler.max_batch_tokens == engine.config.step_tokens


@pytest.mark.parametrize("make", [waits, late])
def test_request_that_never_fits_fails_alone(
    make: Callable[..., Engine], plant: Callable[[Fault], list[int]]
) -> None:
    fine = free_asks()[:3]
    huge = Ask(stream(5)[:9], SamplingParams(temperature=0, max_tokens=4, n=2))
    expected = [alone(tiny_world(), ask) for ask in fine]

    def fault(step: ScheduledStep) -> Exception | None:
        hit = any(chunk.sequence.prompt_ids == tuple(huge.prompt) for chunk in step.chunks)
        return torch.OutOfMemoryError("CUDA out of memory") if hit else None

    plant(fault)
    engine = make()
    *others, failed = drive(engine, (*fine, huge), arrivals=(0, 1, 2, 0))
    assert failed is not None
    assert isinstance(failed.error, StepMemoryError)
    assert not failed.completions
    for want, reply in zip(expected, others, strict=True):
        expect_same(reply, want, "beside one that never fits")
    engine.scheduler.check()
    assert engine.pool.num_free == engine.pool.num_blocks


@pytest.mark.parametrize("make", [waits, late])
def test_device_that_fails_is_told_in_every_call(
    make: Callable[..., Engine], plant: Callable[[Fault], list[int]]
) -> None:
    engine, (ask, *_) = make(), free_asks()
    engine.add(ask.prompt, ask.params)
    engine.step()
    plant(lambda _step: torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(DeviceError, match="illegal memory access"):
        engine.step()
    number = next(iter(engine._requests))
    for call in (engine.step, lambda: engine.add(ask.prompt, ask.params)):
        with pytest.raises(DeviceError):
            call()
    assert engine.abort(number)  # whoever cleans up may
    assert not engine.has_work


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
def test_step_that_cannot_be_recorded_is_queued_kernel_by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = GPU_ASKS[0]
    expected = gpu_alone(ask)
    tried: list[int] = []

    def full(_self: cuda.CudaOps, _work: Any) -> Any:
        tried.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cuda.CudaOps, "recorded", full)
    (reply,) = drive(gpu_engine(prefix_cache=False), [ask])
    expect_same(reply, expected, "without recordings")
    assert ask.params.max_tokens == 3
    assert tried == [1]  # and not again for the third token


def test_ten_thousand_requests_wait_and_none_is_lost() -> None:
    params = SamplingParams(temperature=0, max_tokens=1)
    engine = waits(max_batch_tokens=512, max_batch_sequences=256)
    prompts = [stream(number % 7)[: 1 + number % 5] for number in range(10_000)]
    numbers = [engine.add(prompt, params) for prompt in prompts]
    replies: dict[int, Reply] = {}
    while engine.has_work:
        replies |= {reply.request_id: reply for reply in engine.step()}
    assert sorted(replies) == numbers
    said: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for number, prompt in zip(numbers, prompts, strict=True):
        assert replies[number].error is None
        said.setdefault(tuple(prompt), set()).add(replies[number].completions[0].token_ids)
    assert all(len(each) == 1 for each in said.values())
    engine.scheduler.check()
