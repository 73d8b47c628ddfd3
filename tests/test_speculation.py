"""Drafts change how many steps a reply takes, and no bit of it, whatever else goes on.

Every relation is tried where drafts are accepted and where they are refused, and says so.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isobatch import LLM
from isobatch.config import EngineConfig
from isobatch.engine import sampler
from isobatch.engine.batch import LogitRow
from isobatch.engine.drafts import Drafter
from isobatch.engine.engine import Engine
from isobatch.engine.output import Reply
from isobatch.engine.sampling_params import SamplingParams
from isobatch.engine.scheduled import ScheduledStep
from isobatch.engine.scheduler import Scheduler
from isobatch.engine.seeds import seed_of
from isobatch.engine.verify import verify
from isobatch.errors import ConfigError, IntegrityError
from tests.checkpoints import tiny_model, trained_bpe
from tests.engine_harness import (
    POISON,
    Ask,
    MovedError,
    alone,
    drive,
    expect_same,
    fixed_asks,
    smollm2,
    stream,
    tiny_world,
)
from tests.test_run_ahead import late


def repeating(number: int, period: int, length: int) -> tuple[int, ...]:
    """A prompt that says the same over and over, and ends anywhere in it."""
    return (stream(number)[:period] * length)[:length]


# The tiny model soon says one token again and again, which is what drafts are good at; at higher temperatures
# it leaves that loop now and then, which is where they are refused.
HOW: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {"temperature": 0.5, "seed": 1},
    {"temperature": 1, "seed": 2, "top_k": 2},
    {"temperature": 0.6, "seed": 3, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 0.4, "seed": 4, "repetition_penalty": 0.8, "presence_penalty": -0.5},
    {"temperature": 0, "frequency_penalty": 0.3},
    {"temperature": 0.5, "seed": 6, "prompt_logprobs": 2},
)
ASKS = tuple(
    Ask(
        repeating(i % 3, 20, length),
        SamplingParams(max_tokens=40, ignore_eos=True, logprobs=3, receipt=True, **how),
    )
    for i, (length, how) in enumerate(zip((60, 33, 5, 47, 40, 16, 70), HOW, strict=True))
)


def expect_alone(asks: Sequence[Ask], engine: Engine, why: str, **load: Any) -> None:
    for ask, reply in zip(asks, drive(engine, asks, **load), strict=True):
        if reply is not None:
            expect_same(reply, alone(tiny_world(), ask), why)


def replies(asks: Sequence[Ask]) -> list[Reply]:
    return [alone(tiny_world(), ask) for ask in asks]


def expect_both(engine: Engine) -> None:
    """Drafts were accepted, and drafts were refused."""
    assert 0 < engine.accepted_tokens < engine.drafted_tokens


LOADS: dict[str, dict[str, Any]] = {
    "together": {},
    "without the prefix cache": {"prefix_cache": False},
    "few tokens a step": {"max_batch_tokens": 9},
    "few sequences": {"max_batch_sequences": 2},
    "few blocks": {"blocks": 9, "prefix_cache": False},
    "few blocks, cached": {"blocks": 9},
    **{
        f"chaos {seed}": {"policy": f"chaos:{seed}", "blocks": 14, "max_batch_tokens": 48}
        for seed in range(4)
    },
}


@pytest.mark.parametrize("drafts", [1, 4, 30])
@pytest.mark.parametrize("load", LOADS)
def test_reply_is_that_without_drafts(load: str, drafts: int) -> None:
    engine = tiny_world().engine(draft_tokens=drafts, **LOADS[load])
    expect_alone(ASKS, engine, load, arrivals=[i % 5 for i in range(len(ASKS))])
    expect_alone(ASKS, engine, f"{load}, once more")
    expect_alone(ASKS, engine, f"{load}, some aborted", aborts={1: 3, 4: 9})
    expect_both(engine)


@pytest.mark.parametrize("load", LOADS)
def test_reply_is_that_without_drafts_where_the_device_has_a_queue(load: str) -> None:
    engine = late(draft_tokens=4, **LOADS[load])
    expect_alone(ASKS, engine, load, arrivals=[i % 5 for i in range(len(ASKS))])
    expect_both(engine)


_PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 0.6, 1.0]),
    top_k=st.sampled_from([0, 0, 2, 7]),
    top_p=st.sampled_from([1.0, 0.9, 0.4]),
    min_p=st.sampled_from([0.0, 0.0, 0.1]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.8]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.5]),
    seed=st.integers(0, 2**64 - 1),
    max_tokens=st.integers(1, 30),
    stop_token_ids=st.lists(st.integers(0, 100), max_size=9).map(tuple),
    logprobs=st.sampled_from([None, 3]),
    prompt_logprobs=st.sampled_from([None, None, 3]),
    receipt=st.booleans(),
)
_ASK = st.builds(
    lambda number, period, length, params: Ask(repeating(number, period, length), params),
    st.integers(0, 1),
    st.integers(1, 40),
    st.sampled_from((1, 2, 3, 15, 16, 17, 47, 48, 128, 129)),
    _PARAMS,
)


@settings(max_examples=40, deadline=None)
@given(
    asks=st.lists(_ASK, min_size=1, max_size=4).map(tuple), drafts=st.integers(1, 9), knob=st.integers(0, 99)
)
def test_any_reply_is_that_without_drafts(asks: tuple[Ask, ...], drafts: int, knob: int) -> None:
    policy = f"chaos:{knob}" if knob % 2 else "fcfs"
    engine = tiny_world().engine(draft_tokens=drafts, policy=policy, max_batch_tokens=16 + knob, blocks=24)
    expect_alone(asks, engine, "with drafts", arrivals=[i * knob % 5 for i in range(len(asks))])


class Prompter:
    """Drafts from the very replies, wrong at random places: as other drafters would have them."""

    def __init__(self, replies: Sequence[Reply], seed: int, guess: Callable[[random.Random], int]) -> None:
        self.texts = [reply.prompt_token_ids + reply.completions[0].token_ids for reply in replies]
        self.random, self.guess = random.Random(seed), guess

    def __call__(self, drafter: Drafter, most: int) -> tuple[int, ...]:
        known = tuple(drafter._tokens)
        text = next((text for text in self.texts if text[: len(known)] == known), known)
        ahead = (*text[len(known) :], *[0] * most)[:most]
        return tuple(token if self.random.random() < 0.7 else self.guess(self.random) for token in ahead)


@pytest.mark.parametrize("load", LOADS)
def test_reply_does_not_depend_on_what_is_drafted(load: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asks = fixed_asks()
    prompter = Prompter(replies(asks), 1, lambda chance: chance.randrange(101))
    monkeypatch.setattr(Drafter, "propose", lambda drafter, most: prompter(drafter, most))
    engine = tiny_world().engine(draft_tokens=5, **{**LOADS[load], "blocks": 24})
    expect_alone(asks, engine, load)
    expect_both(engine)


def test_draft_whose_logits_are_nan_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it left in a block is never read, by its own request or by the next."""
    asks = tuple(ask for ask in fixed_asks() if POISON not in ask.prompt)
    prompter = Prompter(replies(asks), 2, lambda _chance: POISON)
    monkeypatch.setattr(Drafter, "propose", lambda drafter, most: prompter(drafter, most))
    engine = tiny_world(poisoned=True).engine(draft_tokens=20, blocks=24)
    for _ in range(2):
        expect_alone(asks, engine, "beside NaN")
    expect_both(engine)


def test_completions_are_those_without_drafts() -> None:
    ask = ASKS[1]
    engine = tiny_world().engine(draft_tokens=4)
    (reply,) = drive(engine, [replace(ask, params=replace(ask.params, n=3))])
    for index in range(3):
        seed = seed_of(ask.params.seed or 0, index)
        single = replace(ask, params=replace(ask.params, seed=seed))
        expect_same(reply, alone(tiny_world(), single), f"completion {index}", index=index)
    expect_both(engine)


@pytest.mark.parametrize("at", range(0, 40, 3))
def test_reply_ends_where_it_does_without_drafts(at: int) -> None:
    """At a stop token or by its length, be it in the middle of accepted drafts."""
    ask = ASKS[1]
    said = alone(tiny_world(), ask).completions[0].token_ids
    ends = (replace(ask.params, stop_token_ids=(said[at],)), replace(ask.params, max_tokens=at + 1))
    asks = [replace(ask, params=params) for params in ends]
    expect_alone(asks, tiny_world().engine(draft_tokens=7), "ended")


def test_context_ends_a_reply_as_it_does_without_drafts() -> None:
    ask = Ask(
        repeating(0, 20, 500), SamplingParams(temperature=0, max_tokens=99, ignore_eos=True, logprobs=1)
    )
    engine = tiny_world().engine(draft_tokens=7)
    expect_alone([ask], engine, "at the context's end")
    assert engine.accepted_tokens


def test_receipt_of_drafted_tokens_is_verified() -> None:
    engine = tiny_world().engine(draft_tokens=4)
    (reply,) = drive(engine, [ASKS[0]])
    assert reply is not None
    receipt = reply.completions[0].receipt
    assert receipt is not None
    assert engine.accepted_tokens
    assert str(verify(tiny_world().engine(), receipt)) == "verified (40 tokens)"


def steps(ask: Ask, drafts: int) -> int:
    engine = tiny_world().engine(draft_tokens=drafts)
    engine.add(ask.prompt, ask.params)
    count = 0
    while engine.has_work:
        engine.step()
        count += 1
    return count


def test_text_that_repeats_itself_takes_fewer_steps() -> None:
    assert steps(ASKS[0], 0) == 40
    assert steps(ASKS[0], 4) < 16
    assert steps(ASKS[0], 9) < steps(ASKS[0], 4)


@pytest.mark.parametrize("value", [-1, 1.5, True, None, "4"])
def test_other_numbers_of_drafts_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"bad draft_tokens; expected an integer of 0 or more"):
        EngineConfig(draft_tokens=value)


# Text.


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[LLM, LLM]:
    """One model without drafts and with them."""
    path: Path = tmp_path_factory.mktemp("tiny")
    tiny_model("llama", vocab_size=448, max_position_embeddings=256).save_pretrained(path)
    trained_bpe("llama-bpe", ["the quick brown fox " * 9]).save(str(path / "tokenizer.json"))
    settings_: dict[str, Any] = {"kv_cache_bytes": 2**20, "progress": False}
    return LLM(path, **settings_), LLM(path, draft_tokens=6, **settings_)


@pytest.mark.parametrize("how", [{"temperature": 0}, {"temperature": 0.1, "seed": 2}])
def test_stop_string_ends_the_text_where_it_does_without_drafts(
    pair: tuple[LLM, LLM], how: dict[str, Any]
) -> None:
    plain, drafting = pair
    params = SamplingParams(max_tokens=48, ignore_eos=True, logprobs=1, receipt=True, **how)
    prompt = "the quick brown fox the quick brown fox the quick"
    (whole,) = plain.generate(prompt, params)
    assert len(whole.text) > 20
    for at in range(0, len(whole.text) - 4, 3):
        for keep in (False, True):
            stop = (whole.text[at : at + 4],)
            each = replace(params, stop=stop, include_stop_str_in_output=keep)
            (want,), (got,) = plain.generate(prompt, each), drafting.generate(prompt, each)
            assert got.completions == want.completions
            assert "".join(drafting.stream(prompt, each)) == want.text
    expect_both(drafting.engine)


# The alarms themselves.


def moved(engine: Engine, asks: Sequence[Ask] = ASKS) -> None:
    with pytest.raises(MovedError):
        expect_alone(asks, engine, "a fault")


def test_control_draft_that_is_not_compared_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = property(lambda row: len(row.sequence) == row.position)
    monkeypatch.setattr(LogitRow, "counts", longest)
    moved(tiny_world().engine(draft_tokens=4))


def test_control_noise_of_the_first_rows_place_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = sampler.draw

    def misplaced(ops: Any, logits: Any, rows: Sequence[LogitRow]) -> Any:
        return draw(ops, logits, [replace(row, position=row.position - len(row.drafts)) for row in rows])

    monkeypatch.setattr(sampler, "draw", misplaced)
    moved(tiny_world().engine(draft_tokens=4), ASKS[1:4])


@pytest.mark.parametrize("forgets", [False, True])
def test_control_penalty_that_forgets_drafts_is_caught(
    forgets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = sampler.draw

    def forgetful(ops: Any, logits: Any, rows: Sequence[LogitRow]) -> Any:
        return draw(ops, logits, [replace(row, drafts=()) for row in rows])

    asks = [replace(ask, params=replace(ask.params, frequency_penalty=0.9)) for ask in ASKS[:2]]
    prompter = Prompter(replies(asks), 1, lambda _chance: 1)
    monkeypatch.setattr(Drafter, "propose", lambda drafter, most: prompter(drafter, most))
    engine = tiny_world().engine(draft_tokens=4)
    if forgets:
        monkeypatch.setattr(sampler, "draw", forgetful)
        moved(engine, asks)
    else:
        expect_alone(asks, engine, "penalised")
        expect_both(engine)


def test_control_refused_draft_in_the_prefix_cache_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is told of blocks before it is known whether their tokens come."""
    commit = Scheduler.commit

    def hasty(self: Scheduler, step: ScheduledStep) -> None:
        commit(self, step)
        for chunk in step.chunks:
            sequence, tip = chunk.sequence, self._tips.get(chunk.sequence.id)
            said = sequence.tokens(0, chunk.stop) + chunk.drafts
            for i in range(chunk.stop // 16, chunk.end // 16):
                assert self._cache is not None
                assert tip is not None
                tip = self._cache.insert(tip, said[i * 16 : i * 16 + 16], sequence.block_table[i])

    monkeypatch.setattr(Scheduler, "commit", hasty)
    with pytest.raises((MovedError, IntegrityError)):
        expect_alone(ASKS, tiny_world().engine(draft_tokens=9), "a fault")


# The same on real weights and real text.


@pytest.mark.weights
def test_real_reply_is_that_without_drafts() -> None:
    text = "The sea is calm. The sky is blue. The sea is calm. The sky is blue. The sea is"
    ids = tuple(smollm2().tokenizer.encode(text))
    asks = [
        Ask(ids, SamplingParams(temperature=t, seed=3, max_tokens=24, logprobs=2, receipt=True))
        for t in (0, 0.7)
    ]
    decoder = smollm2().engine.decoder
    world = replace(tiny_world(), decoder=decoder, blocks=32)
    engine = world.engine(draft_tokens=6)
    for ask, reply in zip(asks, drive(engine, asks), strict=True):
        expect_same(reply, alone(world, ask), "with drafts")
    expect_both(engine)
