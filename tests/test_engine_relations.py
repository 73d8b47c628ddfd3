"""The contract: a reply depends on its request and the weights. Whatever else may vary is varied here.

Each relation serves requests in some other way and compares every bit with the reply to the same request
alone, its prompt in one piece, nothing cached. What equals that equals each other. Below are the negative
controls: the same relations on planted faults and on torch's kernels, where they must fail.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isobatch.bits import first_difference
from isobatch.engine.sampling_params import SamplingParams
from isobatch.engine.seeds import seed_of
from isobatch.errors import NonFiniteLogitsError
from isobatch.kernels.cpu.jit import threads
from isobatch.kernels.layout import PAGE
from tests.engine_harness import (
    POISON,
    Ask,
    MovedError,
    World,
    alone,
    answer,
    captured_logits,
    drive,
    expect_same,
    fixed_asks,
    forward,
    smollm2,
    stream,
    tiny_world,
)

Asks = tuple[Ask, ...]
Relation = Callable[[World, Asks, int], None]
"""A world, requests, and a number that decides whatever the relation leaves open."""


def batched(world: World, asks: Asks, knob: int) -> None:
    """Alone = with others, who come when they like."""
    random_ = random.Random(knob)
    arrivals = [random_.randrange(4) for _ in asks]
    engine = world.engine(
        max_batch_tokens=random_.choice([16, 64, 512]), max_batch_sequences=random_.choice([2, 3, 256])
    )
    for ask, reply in zip(asks, drive(engine, asks, arrivals=arrivals), strict=True):
        expect_same(reply, alone(world, ask), "batched")


def chunked(world: World, asks: Asks, knob: int) -> None:
    """Whole = in chunks, down to single tokens."""
    most = 1 + knob % 40
    for ask in asks:
        engine = world.engine(prefix_cache=False, max_batch_tokens=most)
        expect_same(drive(engine, [ask])[0], alone(world, ask), f"in chunks of {most}")


def decoded(world: World, asks: Asks, _knob: int) -> None:
    """Logits of each decode step = those of one prefill pass over prompt and reply."""
    for ask in asks:
        engine = world.engine(prefix_cache=False)
        with captured_logits(world.decoder) as steps:
            (reply,) = drive(engine, [replace(ask, params=replace(ask.params, prompt_logprobs=None))])
        assert reply is not None
        tokens = ask.prompt + reply.completions[0].token_ids[:-1]
        (whole,) = forward(world.decoder, tokens)
        difference = first_difference(torch.cat(steps), whole[len(ask.prompt) - 1 :])
        if difference is not None:
            raise MovedError(f"decoded: {difference}")


def cached(world: World, asks: Asks, _knob: int) -> None:
    """A hit of any length = a miss; the second time round the whole prompt is a hit."""
    engine = world.engine()
    for repeated in (False, True):
        for ask in asks:
            (reply,) = drive(engine, [ask])
            expect_same(reply, alone(world, ask), "from the prefix cache")
            if repeated and reply is not None and ask.params.prompt_logprobs is None:
                assert reply.cached_tokens == (len(ask.prompt) - 1) // PAGE * PAGE


def preempted(world: World, asks: Asks, knob: int) -> None:
    """Preempted and recomputed = not."""
    longest = max(len(ask.prompt) + ask.params.max_tokens for ask in asks)
    engine = world.engine(blocks=-(-longest // PAGE) + 1, prefix_cache=bool(knob % 2))
    replies = drive(engine, asks)
    for ask, reply in zip(asks, replies, strict=True):
        expect_same(reply, alone(world, ask), "preempted")
    assert any(reply.completions[0].preemptions for reply in replies if reply), "nothing was preempted"


def chaotic(world: World, asks: Asks, knob: int) -> None:
    """A scheduler that decides at random = first come, first served."""
    longest = max(len(ask.prompt) + ask.params.max_tokens for ask in asks)
    engine = world.engine(policy=f"chaos:{knob}", blocks=2 * -(-longest // PAGE), max_batch_tokens=48)
    for ask, reply in zip(asks, drive(engine, asks, arrivals=range(len(asks))), strict=True):
        expect_same(reply, alone(world, ask), "under chaos")


def multiplied(world: World, asks: Asks, knob: int) -> None:
    """n completions = n requests with the derived seeds."""
    n = 2 + knob % 3
    many = [replace(ask, params=replace(ask.params, n=n)) for ask in asks]
    engine = world.engine(policy=f"chaos:{knob}" if knob % 2 else "fcfs")
    for ask, reply in zip(asks, drive(engine, many), strict=True):
        assert reply is not None
        for index, completion in enumerate(reply.completions):
            assert completion.seed == seed_of(ask.params.seed or 0, index)
            single = replace(ask, params=replace(ask.params, seed=completion.seed))
            expect_same(reply, alone(world, single), f"completion {index} of {n}", index=index)


def reordered(world: World, asks: Asks, knob: int) -> None:
    """Submitted in any order."""
    shuffled = random.Random(knob).sample(asks, len(asks))
    for ask, reply in zip(shuffled, drive(world.engine(), shuffled), strict=True):
        expect_same(reply, alone(world, ask), "in another order")


def bereaved(world: World, asks: Asks, knob: int) -> None:
    """Others are aborted in mid-flight: half of all requests, at any step."""
    random_ = random.Random(knob)
    leaving = {i: random_.randrange(8) for i in range(0, len(asks), 2)}
    engine = world.engine(max_batch_tokens=48)
    replies = drive(engine, asks, aborts=leaving)
    for ask, reply in zip(asks, replies, strict=True):
        if reply is not None:
            expect_same(reply, alone(world, ask), "when others were aborted")
    assert all(replies[1::2]), "a request was lost"
    for ask, reply in zip(asks, drive(engine, asks), strict=True):
        expect_same(reply, alone(world, ask), "after others were aborted")


def poisoned(world: World, asks: Asks, knob: int) -> None:
    """Requests that fail with NaN, before, beside and after, in the blocks that are used again."""
    random_ = random.Random(knob)
    failing = []
    for ask in asks:
        at = random_.randrange(len(ask.prompt) + 1)
        prompt = (*ask.prompt[:at], POISON, *ask.prompt[at:])
        failing.append(Ask(prompt, replace(ask.params, prompt_logprobs=None)))
    longest = max(len(ask.prompt) + ask.params.max_tokens for ask in failing)
    engine = world.engine(
        blocks=2 * -(-longest // PAGE), policy=f"chaos:{knob}" if knob % 2 else "fcfs", max_batch_tokens=200
    )
    mixed = [ask for pair in zip(failing, asks, strict=True) for ask in pair]
    for _ in range(2):
        replies = drive(engine, mixed)
        for reply in replies[::2]:
            assert reply is not None
            assert isinstance(reply.error, NonFiniteLogitsError)
            assert reply.completions == ()
        for ask, reply in zip(asks, replies[1::2], strict=True):
            expect_same(reply, alone(world, ask), "beside a request that failed")


def threaded(world: World, asks: Asks, knob: int) -> None:
    """One, two or three threads."""
    with threads(1 + knob % 3):
        replies = drive(world.engine(), asks)
    for ask, reply in zip(asks, replies, strict=True):
        expect_same(reply, alone(world, ask), f"on {1 + knob % 3} threads")


# Prompts end on both sides of a block's and of an attention span's edges, and share beginnings of any length.
_LENGTHS = st.sampled_from((1, 2, 15, 16, 17, 31, 32, 33, 47, 127, 128, 129, 257))
_PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 0, 1, 7]),
    top_p=st.sampled_from([1.0, 0.9, 0.4]),
    min_p=st.sampled_from([0.0, 0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.7, -0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 2**64 - 1),
    max_tokens=st.integers(1, 8),
    ignore_eos=st.booleans(),
    logprobs=st.just(5),
    prompt_logprobs=st.sampled_from([None, None, 0, 3]),
    receipt=st.booleans(),
)
_ASK = st.builds(
    lambda number, length, tail, params: Ask(stream(number)[:length] + stream(9)[:tail], params),
    st.integers(0, 1),
    _LENGTHS,
    st.sampled_from((0, 0, 1, 20)),
    _PARAMS,
)
_ASKS = st.lists(_ASK, min_size=1, max_size=5).map(tuple)
_KNOB = st.integers(0, 2**16)
# Each starts on one or two blocks and grows to three, which is all but one of what there is.
_HUNGRY = st.lists(
    st.builds(
        lambda number, length, params: Ask(
            stream(number)[:length], replace(params, max_tokens=48 - length, ignore_eos=True)
        ),
        st.integers(0, 3),
        st.integers(2, 26),
        _PARAMS,
    ),
    min_size=3,
    max_size=4,
).map(tuple)

GENERAL = [batched, chunked, decoded, cached, chaotic, multiplied, reordered, bereaved, threaded]


@pytest.mark.parametrize("relation", GENERAL)
@settings(max_examples=30, deadline=None)
@given(asks=_ASKS, knob=_KNOB)
def test_reply_depends_on_the_request_alone(relation: Relation, asks: Asks, knob: int) -> None:
    relation(tiny_world(), asks, knob)


@settings(max_examples=12, deadline=None)
@given(asks=_HUNGRY, knob=_KNOB)
def test_preempted_equals_not(asks: Asks, knob: int) -> None:
    preempted(tiny_world(), asks, knob)


@settings(max_examples=12, deadline=None)
@given(asks=_ASKS, knob=_KNOB)
def test_failed_requests_leave_no_trace(asks: Asks, knob: int) -> None:
    poisoned(tiny_world(poisoned=True), asks, knob)


@pytest.mark.parametrize("shared", [*range(50), 127, 128, 129, 143, 144])
def test_hit_of_any_length_equals_miss(shared: int) -> None:
    world, params = tiny_world(), SamplingParams(temperature=0, max_tokens=2, logprobs=5)
    first, second = (Ask(stream(0)[:shared] + stream(n)[: 145 - shared], params) for n in (1, 2))
    engine = world.engine()
    expect_same(drive(engine, [first])[0], alone(world, first), "a miss")
    (reply,) = drive(engine, [second])
    expect_same(reply, alone(world, second), f"sharing {shared} tokens")
    assert reply is not None
    assert reply.cached_tokens == shared // PAGE * PAGE


@pytest.mark.parametrize("most", [1, 2, 3, 15, 16, 17, 127, 128, 129, 144])
def test_any_chunk_length_equals_whole(most: int) -> None:
    asks = [
        Ask(stream(n)[:145], SamplingParams(seed=n, max_tokens=3, logprobs=5, prompt_logprobs=2))
        for n in range(2)
    ]
    for ask, reply in zip(asks, drive(tiny_world().engine(max_batch_tokens=most), asks), strict=True):
        expect_same(reply, alone(tiny_world(), ask), f"in chunks of {most}")


def test_prompt_log_probs_equal_those_of_a_reply_with_the_same_tokens() -> None:
    """Decode = prefill, as a user sees it: a reply can be verified by one pass over it."""
    world = tiny_world()
    for ask in fixed_asks():
        reply = alone(world, ask)
        spoken = reply.completions[0]
        whole = Ask(
            ask.prompt + spoken.token_ids, SamplingParams(max_tokens=1, logprobs=5, prompt_logprobs=5)
        )
        assert alone(world, whole).prompt_log_probs is not None
        assert spoken.log_probs == (alone(world, whole).prompt_log_probs or ())[len(ask.prompt) - 1 :]


def _answer_in_a_new_process(fault: str, thread_count: int, hash_seed: int) -> subprocess.Popen[str]:
    environment = os.environ | {"NUMBA_NUM_THREADS": str(thread_count), "PYTHONHASHSEED": str(hash_seed)}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.engine_harness", fault],
        cwd=Path(__file__).parents[1],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )


def _answers(fault: str, settings_: list[tuple[int, int]]) -> list[str]:
    processes = [_answer_in_a_new_process(fault, *each) for each in settings_]
    answers = [process.communicate()[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    assert all(len(text) == 64 for text in answers)
    return answers


def test_restart_repeats() -> None:
    assert set(_answers("none", [(1, 0), (3, 1)])) == {answer()}


@pytest.mark.parametrize(
    ("fault", "settings_"), [("linear_by_threads", [(1, 0), (3, 0)]), ("sample_by_hash", [(1, 0), (1, 1)])]
)
def test_restart_control_is_caught(fault: str, settings_: list[tuple[int, int]]) -> None:
    assert len(set(_answers(fault, settings_))) == 2


# The alarms themselves: what breaks the contract must be noticed, or all of the above says nothing.

CONTROLS: list[tuple[Relation, str]] = [
    (batched, "linear_by_rows"),
    (batched, "sample_by_row"),
    (batched, "log_probs_by_rows"),
    (batched, "stock"),
    (chunked, "linear_by_rows"),
    (chunked, "cascade_attention"),
    (chunked, "stock"),
    (decoded, "linear_by_rows"),
    (decoded, "cascade_attention"),
    (decoded, "stock"),
    (cached, "careless_cache"),
    (cached, "linear_by_rows"),
    (cached, "cascade_attention"),
    (cached, "stock"),
    (preempted, "linear_by_rows"),
    (preempted, "sample_by_time"),
    (preempted, "stock"),
    (chaotic, "sample_by_time"),
    (chaotic, "sample_by_row"),
    (chaotic, "stock"),
    (multiplied, "sample_by_row"),
    (multiplied, "stock"),
    (reordered, "sample_by_row"),
    (reordered, "stock"),
    (bereaved, "sample_by_row"),
    (bereaved, "stock"),
    (poisoned, "attention_to_page_end"),
    (poisoned, "sample_by_row"),
    (poisoned, "stock"),
    (threaded, "linear_by_threads"),
]


def _thrice(relation: Relation, fault: str) -> None:
    asks = fixed_asks()
    if relation is preempted:
        asks = tuple(Ask(ask.prompt[:20], replace(ask.params, max_tokens=28)) for ask in asks)
    # A careless cache shows only where two prompts part within a block.
    asks += (Ask((*asks[2].prompt[:15], 77, *asks[2].prompt[16:]), asks[2].params),)
    for knob in range(3):
        relation(tiny_world(fault, poisoned=relation is poisoned), asks, knob)


@pytest.mark.parametrize(("relation", "fault"), CONTROLS)
def test_control_is_caught(relation: Relation, fault: str) -> None:
    with pytest.raises(MovedError):
        _thrice(relation, fault)


@pytest.mark.parametrize("relation", dict.fromkeys(relation for relation, _ in CONTROLS))
def test_control_is_silent_without_a_fault(relation: Relation) -> None:
    _thrice(relation, "none")


# The same on real weights and real text.

TEXTS = (
    "The same prompt gives the same bits, whatever else the machine is doing, and it costs nothing, because",
    "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    return fib",
    "Die Würde des Menschen ist unantastbar.",
)


@cache
def _real_asks() -> Asks:
    return tuple(
        Ask(
            tuple(smollm2().tokenizer.encode(text)),
            SamplingParams(
                temperature=i / 2,
                seed=i,
                max_tokens=20,
                ignore_eos=True,
                logprobs=5,
                top_p=0.95,
                receipt=True,
            ),
        )
        for i, text in enumerate(TEXTS)
    )


@cache
def _real_world(kernels: str = "isobatch") -> World:
    fill = float("nan") if kernels == "isobatch" else None
    return World(smollm2(kernels).engine.decoder, fill=fill, blocks=32)


@pytest.mark.weights
@pytest.mark.parametrize("relation", [batched, chunked, decoded, cached, preempted, chaotic, threaded])
def test_real_reply_depends_on_the_request_alone(relation: Relation) -> None:
    relation(_real_world(), _real_asks(), 7)


@pytest.mark.weights
def test_real_control_is_caught() -> None:
    short = tuple(replace(ask, params=replace(ask.params, max_tokens=3)) for ask in _real_asks())
    with pytest.raises(MovedError):
        batched(_real_world("stock"), short, 7)
