"""What users of the engine see: when replies end, what they report, what is refused, what is left behind."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from isobatch.config import EngineConfig
from isobatch.engine.engine import Engine
from isobatch.engine.memory import available_bytes, block_bytes, kv_blocks, require, weight_bytes
from isobatch.engine.output import Reply, TokenLogProbs
from isobatch.engine.request import FinishReason
from isobatch.engine.sampling_params import SamplingParams
from isobatch.errors import (
    CapacityError,
    ConfigError,
    InvalidSamplingError,
    NonFiniteLogitsError,
    OutOfMemoryError,
    PromptError,
    RequestError,
)
from isobatch.kernels.layout import PAGE
from isobatch.kernels.sampling.cpu import SamplingRows
from isobatch.models.loading import load_decoder
from isobatch.ops import certified_ops
from tests.engine_harness import (
    POISON,
    TINY,
    Ask,
    TinyCheckpoint,
    alone,
    drive,
    expect_same,
    fixed_asks,
    forward,
    planted,
    stream,
    tiny_world,
)

PROMPT = stream(0)[:21]


def serve(prompt: tuple[int, ...] = PROMPT, **params: Any) -> Reply:
    (reply,) = drive(tiny_world().engine(), [Ask(prompt, SamplingParams(**params))])
    assert reply is not None
    return reply


def said(reply: Reply) -> tuple[int, ...]:
    return reply.completions[0].token_ids


# When a reply ends.


def test_max_tokens_ends_a_reply() -> None:
    for most in (1, 2, 17):
        completion = serve(max_tokens=most, seed=1, ignore_eos=True).completions[0]
        assert len(completion.token_ids) == most
        assert (completion.finish_reason, completion.stop_reason) == (FinishReason.LENGTH, None)


def test_stop_token_ends_a_reply_and_is_its_last() -> None:
    whole = said(serve(max_tokens=30, seed=1, ignore_eos=True))
    stop = whole[11]
    completion = serve(
        max_tokens=30, seed=1, ignore_eos=True, stop_token_ids=[TINY.vocab_size - 1, stop]
    ).completions[0]
    assert completion.token_ids == whole[: whole.index(stop) + 1]
    assert (completion.finish_reason, completion.stop_reason) == (FinishReason.STOP, stop)


def test_eos_ends_a_reply_unless_ignored() -> None:
    whole = said(serve(max_tokens=30, seed=1, ignore_eos=True))
    decoder = tiny_world().decoder
    decoder = replace(decoder, config=replace(TINY, eos_token_ids=(100, whole[9])))
    world = replace(tiny_world(), decoder=decoder)
    for ignore_eos, expected in ((True, whole), (False, whole[: whole.index(whole[9]) + 1])):
        params = SamplingParams(max_tokens=30, seed=1, ignore_eos=ignore_eos)
        completion = alone(world, Ask(PROMPT, params)).completions[0]
        assert completion.token_ids == expected
        assert completion.stop_reason is None
        assert completion.finish_reason is (FinishReason.LENGTH if ignore_eos else FinishReason.STOP)


def test_context_beyond_the_models_own_is_refused() -> None:
    with pytest.raises(ConfigError, match=f"at most {TINY.context_length}"):
        tiny_world().engine(max_context=TINY.context_length + 1)


@pytest.mark.parametrize(("max_context", "expected"), [(None, TINY.context_length), (40, 40)])
def test_end_of_the_context_ends_a_reply(max_context: int | None, expected: int) -> None:
    prompt = stream(0)[: expected - 5]
    prompt += stream(1)[: expected - 5 - len(prompt)]
    engine = tiny_world().engine(max_context=max_context)
    (reply,) = drive(engine, [Ask(prompt, SamplingParams(max_tokens=10**9, seed=3, ignore_eos=True))])
    assert reply is not None
    assert len(said(reply)) == 5
    assert reply.completions[0].finish_reason is FinishReason.LENGTH


# Seeds and n.


def test_greedy_replies_to_equal_requests_are_equal_in_every_field() -> None:
    first, second = serve(temperature=0), serve(temperature=0)
    assert first.completions == second.completions
    assert first.completions[0].seed == 0


def test_drawn_seed_is_reported_and_repeats_the_reply() -> None:
    first, second = serve(), serve()
    seed = first.completions[0].seed
    assert seed != second.completions[0].seed
    assert 0 <= seed < 2**64
    assert said(serve(seed=seed)) == said(first)


def test_all_64_bits_of_a_seed_count() -> None:
    replies = {said(serve(seed=seed, max_tokens=8)) for seed in (0, 1, 2**32, 2**63, 2**64 - 1)}
    assert len(replies) == 5


def test_n_completions_differ_and_the_first_is_that_of_n_1() -> None:
    many = serve(n=5, seed=7, max_tokens=8)
    assert [completion.index for completion in many.completions] == [0, 1, 2, 3, 4]
    assert len({completion.seed for completion in many.completions}) == 5
    assert len({completion.token_ids for completion in many.completions}) == 5
    assert said(many) == said(serve(seed=7, max_tokens=8))


def test_greedy_takes_the_likeliest_token_whatever_the_seed() -> None:
    tokens = said(serve(temperature=0, seed=1, max_tokens=12, ignore_eos=True))
    assert tokens == said(serve(temperature=0, seed=2, max_tokens=12, ignore_eos=True))
    (logits,) = forward(tiny_world().decoder, PROMPT + tokens)
    assert tokens == tuple(logits[len(PROMPT) - 1 : -1].argmax(-1).tolist())


# Log-probabilities.


def _check_entries(entries: tuple[TokenLogProbs, ...], logits: torch.Tensor, count: int) -> None:
    expected = torch.log_softmax(logits.double(), -1)
    for entry, row, raw in zip(entries, expected, logits, strict=True):
        assert entry.log_prob == pytest.approx(float(row[entry.token_id]), abs=1e-5)
        order = sorted(range(len(raw)), key=lambda token: (-float(raw[token]), token))
        assert [token for token, _ in entry.top] == order[:count]
        assert [log_prob for _, log_prob in entry.top] == pytest.approx(row[order[:count]].tolist(), abs=1e-5)
        assert entry.rank == order.index(entry.token_id) + 1
        if entry.rank <= count:
            assert entry.top[entry.rank - 1] == (entry.token_id, entry.log_prob)


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_log_probs_are_those_of_the_raw_logits(count: int) -> None:
    reply = serve(
        logprobs=count,
        prompt_logprobs=count,
        seed=2,
        max_tokens=9,
        temperature=0.5,
        top_k=40,
        presence_penalty=1,
    )
    log_probs, prompt_log_probs = reply.completions[0].log_probs, reply.prompt_log_probs
    assert log_probs is not None
    assert prompt_log_probs is not None
    assert tuple(entry.token_id for entry in prompt_log_probs) == PROMPT[1:]
    assert tuple(entry.token_id for entry in log_probs) == said(reply)
    (logits,) = forward(tiny_world().decoder, PROMPT + said(reply))
    _check_entries(prompt_log_probs + log_probs, logits[:-1], count)


def test_log_probs_are_left_out_unless_asked_for() -> None:
    reply = serve()
    assert reply.completions[0].log_probs is None
    assert reply.prompt_log_probs is None
    assert serve(prompt=(3,), prompt_logprobs=1).prompt_log_probs == ()


def test_more_log_probs_than_tokens_are_all_there_are() -> None:
    config = replace(TINY, vocab_size=7)
    decoder = load_decoder(TinyCheckpoint(config=config), certified_ops())
    params = SamplingParams(logprobs=20, prompt_logprobs=20, max_tokens=2, ignore_eos=True)
    reply = alone(replace(tiny_world(), decoder=decoder), Ask((1, 2, 3), params))
    for entry in (*(reply.completions[0].log_probs or ()), *(reply.prompt_log_probs or ())):
        assert sorted(token for token, _ in entry.top) == list(range(7))
        assert sum(math.exp(log_prob) for _, log_prob in entry.top) == pytest.approx(1, abs=1e-5)


# How tokens are chosen.


@pytest.mark.parametrize(
    "penalties",
    [
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.7},
        {"presence_penalty": 1.5},
        {"presence_penalty": -2.0},
        {"frequency_penalty": -2.0},
        {"repetition_penalty": 1.2, "presence_penalty": -0.5, "frequency_penalty": 0.9},
    ],
)
def test_penalties_are_those_computed_by_hand(penalties: dict[str, Any]) -> None:
    params = SamplingParams(temperature=0, max_tokens=25, ignore_eos=True, **penalties)
    tokens = said(alone(tiny_world(), Ask(PROMPT, params)))
    (logits,) = forward(tiny_world().decoder, PROMPT + tokens)
    for i, (token, row) in enumerate(zip(tokens, logits[len(PROMPT) - 1 : -1].double(), strict=True)):
        counts = Counter(tokens[:i])
        for seen in {*PROMPT, *counts}:
            factor = params.repetition_penalty
            row[seen] = row[seen] / factor if row[seen] > 0 else row[seen] * factor
            row[seen] -= params.frequency_penalty * counts[seen]
            row[seen] -= params.presence_penalty * (counts[seen] > 0)
        assert float(row[token]) == pytest.approx(float(row.max()), abs=1e-5)


def test_repetition_penalty_lowers_repeats() -> None:
    def repeats(penalty: float) -> int:
        tokens = said(serve(temperature=0, max_tokens=60, repetition_penalty=penalty, ignore_eos=True))
        return len(tokens) - len(set(tokens))

    assert repeats(2.0) < repeats(1.0) < repeats(0.5)


def _kept(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Probabilities after all filters, in float64."""
    p = torch.softmax(logits.double() / temperature, -1)
    p[p < min_p * p.max()] = 0
    ordered, ids = p.sort(descending=True, stable=True)
    if top_k:
        ordered[top_k:] = 0
    ordered[ordered.cumsum(0) - ordered >= top_p * ordered.sum()] = 0
    return torch.zeros_like(p).scatter(0, ids, ordered / ordered.sum())


def _p_value(counts: torch.Tensor, p: torch.Tensor) -> float:
    """Of Pearson's chi-square test, rare tokens taken together."""
    expected = p * counts.sum()
    rare = expected < 8
    pooled = torch.stack([expected[rare].sum(), counts[rare].sum()])
    bins = torch.cat([torch.stack([expected[~rare], counts[~rare]]), pooled[:, None]], 1)
    bins = bins[:, bins[0] > 0]
    statistic = ((bins[1] - bins[0]) ** 2 / bins[0]).sum()
    degrees = torch.tensor(bins.shape[1] - 1, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees / 2, statistic / 2))


def _draw(logits: torch.Tensor, parameters: tuple[float, int, float, float], vary: str) -> torch.Tensor:
    """How often each token is chosen in 20,000 draws that differ in their seed or position alone."""
    draws = 20_000
    temperature, top_k, top_p, min_p = parameters
    varied, fixed = torch.arange(draws), torch.full((draws,), 77)
    rows = SamplingRows(
        temperature=torch.full((draws,), temperature),
        top_k=torch.full((draws,), top_k),
        top_p=torch.full((draws,), top_p),
        min_p=torch.full((draws,), min_p),
        seed=varied if vary == "seed" else fixed,
        position=varied if vary == "position" else fixed,
    )
    tokens = certified_ops().sample(logits.expand(draws, -1), rows)
    return torch.bincount(tokens, minlength=len(logits)).double()


@pytest.mark.parametrize("vary", ["seed", "position"])
@pytest.mark.parametrize(
    "parameters",
    [
        (1.0, 0, 1.0, 0.0),
        (0.3, 0, 1.0, 0.0),
        (1.0, 9, 1.0, 0.0),
        (0.7, 0, 0.8, 0.0),
        (1.5, 0, 1.0, 0.2),
        (0.8, 20, 0.9, 0.05),
    ],
)
def test_tokens_are_drawn_from_the_filtered_distribution(
    parameters: tuple[float, int, float, float], vary: str
) -> None:
    logits = forward(tiny_world().decoder, PROMPT)[0][-1]
    p, counts = _kept(logits, *parameters), _draw(logits, parameters, vary)
    assert int(counts[p == 0].sum()) == 0
    assert _p_value(counts, p) > 1e-6


def test_control_with_another_temperature_is_caught() -> None:
    logits = forward(tiny_world().decoder, PROMPT)[0][-1]
    counts = _draw(logits, (1.0, 0, 1.0, 0.0), "seed")
    assert _p_value(counts, _kept(logits, 1.1, 0, 1.0, 0.0)) < 1e-6


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-30}])
def test_filters_that_leave_one_token_are_greedy(params: dict[str, Any]) -> None:
    greedy = said(serve(temperature=0, max_tokens=8, ignore_eos=True))
    assert said(serve(max_tokens=8, ignore_eos=True, seed=5, **params)) == greedy


def test_top_k_beyond_the_vocabulary_is_no_filter() -> None:
    unfiltered = said(serve(seed=4))
    for top_k in (TINY.vocab_size, 2**31 - 1):
        assert said(serve(seed=4, top_k=top_k)) == unfiltered


# What is refused, and what is left behind.


@pytest.mark.parametrize(
    ("prompt", "params", "error", "message"),
    [
        ((), {}, PromptError, "at least one token"),
        (stream(0)[:100], {}, PromptError, "1 to 99 tokens"),
        ((1, TINY.vocab_size), {}, PromptError, "0 to 100"),
        ((1, -1), {}, PromptError, "got -1"),
        ((1, "x"), {}, PromptError, "got 'x'"),
        ((1, True), {}, PromptError, "got True"),
        ((1, 2.0), {}, PromptError, "got 2.0"),
        (stream(0)[:60], {"max_tokens": 30}, CapacityError, "at most 5 blocks"),
        ((1,), {"stop": "x"}, InvalidSamplingError, "stop_token_ids"),
        ((1,), {"stop_token_ids": [7, TINY.vocab_size]}, InvalidSamplingError, "0 to 100; got 101"),
        ((1,), {"stop_token_ids": [2**100]}, InvalidSamplingError, "0 to 100"),
    ],
)
def test_request_that_can_never_be_served_is_refused_at_once(
    prompt: Any, params: dict[str, Any], error: type[RequestError], message: str
) -> None:
    engine = tiny_world().engine(blocks=5, max_context=100)
    with pytest.raises(error, match=message):
        engine.add(prompt, SamplingParams(**params, n=3))
    assert not engine.has_work
    assert not engine.scheduler.has_work
    ask = Ask(PROMPT, SamplingParams(seed=1, logprobs=5))
    expect_same(drive(engine, [ask])[0], alone(tiny_world(), ask), "after a refusal")


def test_memory_that_does_not_suffice_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(ConfigError, match=r"at least 8192 bytes: .*kv_cache_bytes=8191"):
        kv_blocks(TINY, 8191)
    assert kv_blocks(TINY, 2 * 8192 + 1) == 2
    assert block_bytes(TINY) == 2 * 2 * 2 * 16 * PAGE * 4 == 8192
    need = weight_bytes(TINY) + 10**6
    require(weight_bytes(TINY), 10**6, need)
    require(weight_bytes(TINY), 10**6, None)
    with pytest.raises(OutOfMemoryError, match="1,000,000 of KV cache") as caught:
        require(weight_bytes(TINY), 10**6, need - 1)
    assert f"{need:,}" in str(caught.value)
    assert f"{need - 1:,} available" in str(caught.value)


def test_available_memory_is_the_least_that_anyone_leaves(tmp_path: Path) -> None:
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
    assert available_bytes(meminfo, cgroup) is None
    meminfo.write_text("MemTotal:  9000 kB\nMemAvailable:    5000 kB\nMemFree: 10 kB\n")
    assert available_bytes(meminfo, cgroup) == 5_120_000
    cgroup.mkdir()
    (cgroup / "memory.current").write_text("300000\n")
    for limit, expected in (("max", 5_120_000), ("1000000", 700_000), ("9000000", 5_120_000), ("1", 0)):
        (cgroup / "memory.max").write_text(f"{limit}\n")
        assert available_bytes(meminfo, cgroup) == expected


def test_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="chaos"):
        Engine(tiny_world().decoder, None, EngineConfig(policy="chaos:x"))


def test_abort_frees_the_blocks_at_once() -> None:
    engine = tiny_world().engine(max_batch_tokens=16)
    kept = engine.add(stream(1)[:40], SamplingParams(seed=1, max_tokens=5))
    dropped = engine.add(PROMPT, SamplingParams(n=3))
    for _ in range(5):
        engine.step()
    held = engine.pool.num_blocks - engine.pool.num_free
    assert engine.abort(dropped)
    engine.scheduler.check()
    assert held - (engine.pool.num_blocks - engine.pool.num_free) >= 2
    assert not engine.abort(dropped)
    assert engine.abort(kept)
    assert not engine.has_work
    assert engine.step() == []
    assert engine.pool.num_free == engine.pool.num_blocks
    engine.scheduler.check()


class BrokenError(Exception):
    """Stands for whatever may go wrong in the middle of a step."""


def _break_at(op: str, call: int) -> Callable[[str, Mapping[str, Any], Any], None]:
    seen = 0

    def observer(name: str, _arguments: Mapping[str, Any], _result: Any) -> None:
        nonlocal seen
        seen += name == op
        if name == op and seen == call:
            raise BrokenError(op)

    return observer


@pytest.mark.parametrize("call", [1, 4])
@pytest.mark.parametrize("op", ["embedding", "write_kv", "attention", "penalize", "sample", "top_log_probs"])
def test_step_that_fails_can_be_run_again(op: str, call: int) -> None:
    asks = [replace(ask, params=replace(ask.params, prompt_logprobs=2)) for ask in fixed_asks()[:4]]
    engine = tiny_world().engine(max_batch_tokens=64)
    ids = [engine.add(ask.prompt, ask.params) for ask in asks]
    replies: dict[int, Reply] = {}
    failures = 0
    with engine.decoder.ops.observed(_break_at(op, call)):
        while engine.has_work:
            try:
                replies |= {reply.request_id: reply for reply in engine.step()}
            except BrokenError:
                failures += 1
            engine.scheduler.check()
    assert failures == 1
    for number, ask in zip(ids, asks, strict=True):
        expect_same(replies[number], alone(tiny_world(), ask), f"after {op} failed")


def _nan_for(token: int) -> Any:
    """A model whose logits are NaN right after a token, and nowhere else."""
    decoder = tiny_world().decoder
    seen: list[torch.Tensor] = []
    table = decoder.ops._table

    def embedding(token_ids: torch.Tensor, weight: Any) -> torch.Tensor:
        seen.append(token_ids)
        result: torch.Tensor = table["embedding"](token_ids=token_ids, weight=weight)
        return result

    def linear(x: torch.Tensor, weight: Any, bias: Any) -> torch.Tensor:
        result: torch.Tensor = table["linear"](x=x, weight=weight, bias=bias)
        if weight is decoder.output and len(result) == len(seen[-1]):
            result[seen[-1] == token] = float("nan")
        return result

    return replace(tiny_world(), decoder=replace(decoder, ops=planted(embedding=embedding, linear=linear)))


def test_prompt_log_probs_that_are_no_numbers_fail_the_request() -> None:
    """Also where the logits that are sampled from would be fine."""
    params = SamplingParams(prompt_logprobs=0, max_tokens=3, seed=1, ignore_eos=True)
    prompt = (*PROMPT[:8], 100, *PROMPT[8:])
    world = _nan_for(100)
    with pytest.raises(NonFiniteLogitsError, match="position 9"):
        _ = alone(world, Ask(prompt, params)).text
    assert alone(world, Ask(PROMPT, params)).error is None


def test_failed_completion_takes_its_siblings_with_it() -> None:
    world = tiny_world(poisoned=True)
    ask = Ask((*PROMPT, POISON), SamplingParams(n=4, logprobs=1, prompt_logprobs=1, seed=9))
    engine = world.engine()
    (reply,) = drive(engine, [ask])
    assert reply is not None
    assert isinstance(reply.error, NonFiniteLogitsError)
    assert reply.prompt_log_probs is None
    assert reply.completions == ()
    with pytest.raises(NonFiniteLogitsError, match="NaN or infinity with seed 9"):
        _ = reply.text


def test_failure_of_one_of_n_does_not_tell_the_load() -> None:
    """One that happens to say POISON fails with its next token; how far the others are is the load's."""
    params = SamplingParams(n=8, temperature=2, stop_token_ids=tuple(range(85, 101)), max_tokens=60)
    asks = [Ask(PROMPT, replace(params, seed=seed)) for seed in range(20)]
    world = tiny_world(poisoned=True)
    want = [alone(world, ask) for ask in asks]
    assert 0 < sum(reply.error is not None for reply in want) < len(want)
    chaotic = world.engine(policy="chaos:4", max_batch_tokens=24, max_batch_sequences=9)
    for got, expected in zip(drive(chaotic, asks), want, strict=True):
        expect_same(got, expected, "a failure under load")
