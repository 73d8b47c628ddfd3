"""The scheduler under random load: whatever it decides, every reply is the one the model gives alone.

The alarm is tested too: pools, caches and schedulers that are broken on purpose must be noticed.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from isobatch.engine.block_pool import BlockPool
from isobatch.engine.policies import Chaos
from isobatch.engine.prefix_cache import Node, PrefixCache
from isobatch.engine.request import FinishReason, Sequence
from isobatch.engine.sampling_params import SamplingParams
from isobatch.engine.scheduled import Plan, ScheduledStep
from isobatch.engine.scheduler import Scheduler
from tests.scheduler_world import VOCAB, Tokens, World, random_load, random_loads, spans

POLICIES = ["fcfs", "chaos:0", "chaos:1"]

# Every reply is the model's own.


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("policy", [*POLICIES, "chaos:2", "chaos:3"])
@pytest.mark.parametrize("blocks", [8, 9, 40])  # 8: one sequence at the context's end takes them all
def test_replies_do_not_depend_on_the_scheduler(policy: str, cached: bool, blocks: int) -> None:
    random_loads(policy, cached=cached, blocks=blocks)


@pytest.mark.parametrize("size", [1, 3, 16, 64])
@pytest.mark.parametrize("policy", POLICIES)
def test_replies_do_not_depend_on_the_block_size(policy: str, size: int) -> None:
    random_load(World(policy, blocks=-(-16 // size), size=size), 0)


@pytest.mark.parametrize(("tokens", "sequences"), [(1, 1), (1, 4), (3, 2), (100, 1), (100, 100)])
@pytest.mark.parametrize("policy", POLICIES)
def test_replies_do_not_depend_on_the_batch_limits(policy: str, tokens: int, sequences: int) -> None:
    random_load(World(policy, batch_tokens=tokens, batch_sequences=sequences), 0)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("blocks", [8, 9, 40])
def test_replies_do_not_depend_on_drafts(policy: str, cached: bool, blocks: int) -> None:
    worlds = random_loads(policy, cached=cached, blocks=blocks, batch_tokens=12, draft_tokens=4)
    assert sum(world.accepted for world in worlds) > 20
    assert sum(world.drafted - world.accepted for world in worlds) > 20


class SchedulerMachine(RuleBasedStateMachine):
    """Anything at any time: arrivals, aborts between and during steps, runs that break off half-way."""

    @initialize(
        policy=st.just("fcfs") | st.integers(0, 2**16).map("chaos:{}".format),
        cached=st.booleans(),
        size=st.integers(1, 4),
        spare=st.integers(0, 4),
        batch_tokens=st.integers(1, 12),
        batch_sequences=st.integers(1, 5),
        draft_tokens=st.sampled_from([0, 1, 4]),
    )
    def start(self, policy: str, cached: bool, size: int, spare: int, **limits: Any) -> None:
        self.world = World(policy, cached=cached, blocks=-(-16 // size) + spare, size=size, **limits)

    @rule(
        prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=10).map(tuple),
        again=st.integers(0, 99),
        max_tokens=st.integers(1, 8),
        copies=st.integers(1, 3),
        params=st.fixed_dictionaries(
            {"prompt_logprobs": st.none() | st.just(0), "ignore_eos": st.booleans()}
        ),
    )
    def add(self, prompt: Tokens, again: int, max_tokens: int, copies: int, params: dict[str, Any]) -> None:
        earlier = self.world.sequences
        if again % 2 and earlier:  # the next turn of an earlier conversation
            before = earlier[again % len(earlier)]
            prompt = (before.tokens(0, len(before)) + prompt)[:12]
        self.world.add(prompt, max_tokens=max_tokens, copies=copies, **params)

    @rule(times=st.integers(1, 4))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.world.step()

    @precondition(lambda self: self.world.sequences)
    @rule(which=st.integers(0, 99), during_step=st.booleans())
    def abort(self, which: int, during_step: bool) -> None:
        target = self.world.sequences[which % len(self.world.sequences)]
        unfinished = target.finish_reason is None

        def abort() -> None:
            assert self.world.scheduler.abort(target.id) == unfinished

        if during_step and self.world.scheduler.has_work:
            self.world.step(interrupt=abort)
        else:
            abort()

    @precondition(lambda self: self.world.scheduler.has_work)
    @rule(fatal=st.booleans())
    def step_fails(self, fatal: bool) -> None:
        """The run breaks off half-way, leaving rubbish in the slots that it was to write."""
        step = self.world.scheduler.schedule()
        assert step is not None
        for chunk in step.chunks:
            for position in range(chunk.start, chunk.end):
                self.world.kv[self.world.slot(chunk.block_table, position)] = (-1,)
            if fatal:
                self.world.scheduler.finish(chunk.sequence, FinishReason.ERROR)

    @invariant()
    def sound(self) -> None:
        self.world.scheduler.check()

    def teardown(self) -> None:
        self.world.drain()


SchedulerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
TestSchedulerMachine = SchedulerMachine.TestCase


# The alarm itself: things broken on purpose must be noticed, or all of the above says nothing.


class FreesTwice(BlockPool):
    def decref(self, block: int) -> None:
        super().decref(block)
        if self.references(block):  # shared: the other holder loses it too
            super().decref(block)


class HandsOutIdleBlocksUnheard(BlockPool):
    def allocate(self) -> int:
        self.on_evict = None
        return super().allocate()


class HandsOutHeldBlocks(BlockPool):
    def allocate(self) -> int:
        block = super().allocate()
        if self.num_free % 3 == 0 and self.references(0) == 1 and block != 0:
            self.decref(block)
            self.incref(0)
            return 0
        return block


class KnowsBlocksByHash(PrefixCache):
    """Its hash, the sum of the tokens modulo 2, collides often; a good hash would collide once a year."""

    def _hash(self, tokens: Tokens) -> Tokens:
        return (sum(tokens) % 2, *[0] * (self._pool.block_size - 1))

    def match(self, tokens: Tokens) -> tuple[list[int], Node]:
        size = self._pool.block_size
        full = range(0, len(tokens) - size + 1, size)
        return super().match(sum((self._hash(tokens[i : i + size]) for i in full), ()))

    def insert(self, parent: Node, tokens: Tokens, block: int) -> Node:
        return super().insert(parent, self._hash(tokens), block)


class IgnoresTheParent(PrefixCache):
    def insert(self, parent: Node, tokens: Tokens, block: int) -> Node:
        return super().insert(self.root, tokens, block)


class RemembersPartialPrefixes(PrefixCache):
    """Serves a block whose last token differs from the one asked for."""

    def match(self, tokens: Tokens) -> tuple[list[int], Node]:
        blocks, node = super().match(tokens)
        for child in list(node.children.values())[:1] if len(tokens) > len(blocks) * 2 + 2 else []:
            return [*blocks, child.block], child
        return blocks, node


@pytest.mark.parametrize("broken", [FreesTwice, HandsOutIdleBlocksUnheard, HandsOutHeldBlocks])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_broken_pool_is_caught(policy: str, broken: type[BlockPool]) -> None:
    with pytest.raises(AssertionError):
        random_loads(policy, pool_type=broken)


@pytest.mark.parametrize("broken", [KnowsBlocksByHash, IgnoresTheParent, RemembersPartialPrefixes])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_broken_prefix_cache_is_caught(policy: str, broken: type[PrefixCache]) -> None:
    with pytest.raises(
        AssertionError, match=r"the KV cache has other tokens|shared by sequences that differ"
    ):
        random_loads(policy, cache_type=broken)


class ClaimsMoreThanItFound(Scheduler):
    """Takes one token more for computed than the blocks it starts from hold."""

    def _admit(self, sequence: Sequence, plan: Plan) -> bool:
        admitted = super()._admit(sequence, plan)
        if admitted and sequence.preemptions and sequence.remaining > 1:
            sequence.computed += 1
        return admitted


@pytest.mark.parametrize("policy", POLICIES)
def test_a_skipped_recomputation_is_caught(policy: str) -> None:
    with pytest.raises(AssertionError, match=r"the KV cache has other tokens|holds 0 blocks"):
        random_loads(policy, scheduler_type=ClaimsMoreThanItFound)


class BelievesDrafts(World):
    def agree(self, token: int, draft: int) -> bool:
        return True


class CachesDrafts(Scheduler):
    """The blocks of drafts become known with those of the tokens."""

    def commit(self, step: ScheduledStep) -> None:
        super().commit(step)
        size = self._pool.block_size
        for chunk in step.chunks:
            sequence = chunk.sequence
            if sequence.finish_reason is None and self._cache is not None:
                said, tip = sequence.tokens(0, chunk.stop) + chunk.drafts, self._tips[sequence.id]
                for i in range(chunk.stop // size, chunk.end // size):
                    tip = self._cache.insert(tip, said[i * size :][:size], sequence.block_table[i])
                self._tips[sequence.id] = tip


@pytest.mark.parametrize("policy", POLICIES)
def test_a_draft_that_is_not_compared_is_caught(policy: str) -> None:
    with pytest.raises(AssertionError):
        random_loads(policy, BelievesDrafts, draft_tokens=4)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_draft_in_the_prefix_cache_is_caught(policy: str) -> None:
    with pytest.raises(AssertionError):
        random_loads(policy, scheduler_type=CachesDrafts, draft_tokens=4, blocks=40)


# Chaos is chaotic, and ends.


def make_sequence(arrival: int, *, preemptions: int = 0) -> Sequence:
    sequence = Sequence(id=arrival, prompt_ids=(1,), params=SamplingParams(), seed=0, arrival=arrival)
    sequence.preemptions = preemptions
    return sequence


def test_chaos_does_everything_it_may() -> None:
    policy, wild = Chaos(0), [make_sequence(arrival) for arrival in range(3)]
    assert {policy.chunk(wild[0], 5) for _ in range(200)} == {1, 2, 3, 4, 5}
    assert {policy.victim(wild).id for _ in range(200)} == {0, 1, 2}
    assert {min(wild, key=policy.rank).id for _ in range(200)} == {0, 1, 2}
    assert {policy.interrupts(wild[0]) for _ in range(200)} == {True, False}


def test_chaos_leaves_those_alone_who_suffered_enough() -> None:
    policy, wild = Chaos(0), make_sequence(0)
    calm = [make_sequence(arrival, preemptions=4) for arrival in (1, 2)]
    for _ in range(200):
        assert sorted([wild, *reversed(calm)], key=policy.rank) == [*calm, wild]
        assert policy.victim([*calm, wild]) is wild
        assert policy.victim(calm) is calm[1]
        assert not any(policy.interrupts(sequence) for sequence in calm)


class Merciless(Chaos):
    def interrupts(self, sequence: Sequence) -> bool:
        return True


def test_a_policy_that_never_ends_is_caught() -> None:
    world = World(Merciless(0), cached=False, batch_tokens=1)
    world.add((1, 2))
    with pytest.raises(AssertionError, match="no end in sight"):
        world.drain()


def test_chaos_decides_otherwise_and_replies_the_same() -> None:
    def history(policy: str) -> list[list[tuple[int, int, int]]]:
        world = World(policy, blocks=40, batch_tokens=20)
        for number in range(4):
            world.add((number % VOCAB, 1, 2, 1, 1, 2), max_tokens=3)
        steps = []
        while (step := world.step()) is not None:
            steps.append(spans(step))
        world.drain()
        return steps

    histories = [history(policy) for policy in ("fcfs", "chaos:0", "chaos:1", "chaos:2")]
    assert all(one != other for i, one in enumerate(histories) for other in histories[:i])
    assert history("chaos:1") == histories[2]  # the seed says it all


def test_chaos_preempts_even_without_need() -> None:
    assert sum(random_load(World(f"chaos:{seed}", blocks=400), seed).preempted for seed in range(5)) > 5


@pytest.mark.parametrize("seed", range(8))
def test_chaos_ends_in_the_smallest_pool(seed: int) -> None:
    world = World(f"chaos:{seed}", cached=False, blocks=8, size=2, batch_tokens=100, batch_sequences=100)
    for number in range(12):
        world.add((number % VOCAB,) * 8, max_tokens=8)
    world.drain()
    assert world.preempted > 12  # and it was no walk in the park
