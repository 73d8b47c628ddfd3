"""The scheduler against a fake model: whatever it decides, every reply is the one the model gives alone.

The fake KV cache remembers, per slot, the whole prefix that was computed into it, and every chunk looks at
every slot of its context before anything is written. A block handed out too early, freed twice, found under
another prompt's tokens or not recomputed shows up as a wrong prefix in some slot.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from isobatch.engine.block_pool import BlockPool
from isobatch.engine.policies import Chaos, FirstComeFirstServed, Policy, policy_from_name
from isobatch.engine.prefix_cache import Node, PrefixCache
from isobatch.engine.request import FinishReason, Sequence
from isobatch.engine.sampling_params import SamplingParams
from isobatch.engine.scheduler import ScheduledStep, Scheduler, _Draft
from isobatch.errors import (
    CapacityError,
    ConfigError,
    IntegrityError,
    PromptError,
    UnknownKeyError,
    UnknownRequestError,
)

Tokens = tuple[int, ...]
VOCAB, EOS = 3, 0  # few token ids, so that prompts share prefixes and replies meet again
POLICIES = ["fcfs", "chaos:0", "chaos:1"]


def next_token(tokens: Tokens) -> int:
    state = 7
    for token in tokens:
        state = (state * 31 + token + 1) % 10007
    return state // 5 % VOCAB


def is_stopped(reply: list[int], params: SamplingParams) -> bool:
    return reply[-1:] == [EOS] and not params.ignore_eos


def reply_alone(prompt: Tokens, params: SamplingParams, context: int) -> list[int]:
    reply: list[int] = []
    most = min(params.max_tokens, context - len(prompt))
    while len(reply) < most and not is_stopped(reply, params):
        reply.append(next_token((*prompt, *reply)))
    return reply


class World:
    """A scheduler, the engine's loop around it, and a KV cache that knows what is in it."""

    def __init__(
        self,
        policy: Policy | str = "fcfs",
        *,
        cached: bool = True,
        blocks: int = 8,
        size: int = 2,
        batch_tokens: int = 8,
        batch_sequences: int = 4,
        context: int = 16,
        pool_type: type[BlockPool] = BlockPool,
        cache_type: type[PrefixCache] = PrefixCache,
        scheduler_type: type[Scheduler] = Scheduler,
    ) -> None:
        self.pool = pool_type(blocks, size)
        self.cache = cache_type(self.pool) if cached else None
        self.scheduler = scheduler_type(
            self.pool,
            self.cache,
            policy_from_name(policy) if isinstance(policy, str) else policy,
            max_batch_tokens=batch_tokens,
            max_batch_sequences=batch_sequences,
            max_context=context,
        )
        self.batch_tokens, self.batch_sequences, self.context = batch_tokens, batch_sequences, context
        self.kv: dict[tuple[int, int], Tokens] = {}
        self.sequences: list[Sequence] = []
        self.seen: dict[int, set[int]] = {}  # positions whose logits were computed
        self.steps = self.computed = self.preempted = 0

    def add(self, prompt: Tokens, *, copies: int = 1, **params: Any) -> list[Sequence]:
        added = []
        for index in range(copies):
            sequence = Sequence(
                id=len(self.sequences),
                prompt_ids=prompt,
                params=SamplingParams(**{"n": copies, "max_tokens": 4, "ignore_eos": True, **params}),
                seed=0,
                arrival=len(self.sequences),
                index=index,
            )
            self.scheduler.add(sequence)
            self.sequences.append(sequence)
            self.seen[sequence.id] = set()
            added.append(sequence)
        return added

    def slot(self, table: Tokens, position: int) -> tuple[int, int]:
        return table[position // self.pool.block_size], position % self.pool.block_size

    def compute(self, step: ScheduledStep) -> dict[int, int]:
        """Run the fake model on a step and return each sampling sequence's next token."""
        read, written = set(), {}
        for chunk in step.chunks:
            sequence = chunk.sequence
            assert chunk.token_ids == sequence.tokens(chunk.start, chunk.stop)
            for position in range(chunk.start):
                slot = self.slot(chunk.block_table, position)
                read.add(slot)
                assert self.kv.get(slot) == sequence.tokens(0, position + 1), "the KV cache has other tokens"
            for position in range(chunk.start, chunk.stop):
                slot = self.slot(chunk.block_table, position)
                assert slot not in written, "two sequences write one slot"
                written[slot] = sequence.tokens(0, position + 1)
            self.seen[sequence.id].update(range(chunk.start, chunk.stop))
        assert read.isdisjoint(written), "a slot is read and written in one step"
        assert sum(len(chunk.token_ids) for chunk in step.chunks) == len(written) <= self.batch_tokens
        assert len({chunk.sequence.id for chunk in step.chunks}) == len(step.chunks) <= self.batch_sequences
        self.kv.update(written)
        return {
            chunk.sequence.id: next_token(written[self.slot(chunk.block_table, chunk.stop - 1)])
            for chunk in step.chunks
            if chunk.samples
        }

    def step(self, interrupt: Callable[[], object] = lambda: None) -> ScheduledStep | None:
        """Go once round the engine's loop; `interrupt` is called while the step is in flight."""
        step = self.scheduler.schedule()
        if step is None:
            return None
        self.scheduler.check()
        sampled = self.compute(step)
        interrupt()
        self.scheduler.commit(step)
        for chunk in step.chunks:
            sequence = chunk.sequence
            if sequence.finish_reason is not None or sequence.id not in sampled:
                continue
            if sequence.params.prompt_logprobs is not None:
                assert self.seen[sequence.id].issuperset(range(len(sequence.prompt_ids)))
            sequence.append(sampled[sequence.id])
            if is_stopped(sequence.output_ids, sequence.params):
                self.scheduler.finish(sequence, FinishReason.STOP)
            elif len(sequence) == self.scheduler.token_limit(sequence):
                self.scheduler.finish(sequence, FinishReason.LENGTH)
        self.scheduler.check()
        self.steps += 1
        self.computed += sum(len(chunk.token_ids) for chunk in step.chunks)
        self.preempted += len(step.preempted)
        return step

    def drain(self) -> None:
        """Run to the end, and verify every reply and that every block came back."""
        work = sum(self.scheduler.token_limit(s) for s in self.sequences if s.finish_reason is None)
        most = self.steps + 10 * work + 10
        while self.step() is not None:
            assert self.steps < most, "no end in sight"
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert not self.scheduler.has_work
        assert self.pool.num_free == self.pool.num_blocks
        for sequence in self.sequences:
            alone = reply_alone(sequence.prompt_ids, sequence.params, self.context)
            assert not sequence.block_table
            if sequence.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):
                assert sequence.output_ids == alone
                assert (sequence.finish_reason is FinishReason.STOP) == is_stopped(alone, sequence.params)
            else:
                assert sequence.finish_reason in (FinishReason.ABORT, FinishReason.ERROR)
                assert sequence.output_ids == alone[: len(sequence.output_ids)]


def random_load(world: World, seed: int, sequences: int = 12) -> World:
    """Requests with shared prefixes coming in while others run, some aborted, some failing."""
    draw = random.Random(seed)
    stems = [tuple(draw.choices(range(VOCAB), k=6)) for _ in range(2)]
    while len(world.sequences) < sequences:
        tail = tuple(draw.choices(range(VOCAB), k=draw.randint(0, 4)))
        world.add(
            draw.choice(stems)[: draw.randint(1, 6)] + tail,
            max_tokens=draw.randint(1, 8),
            copies=draw.randint(1, 3),
            prompt_logprobs=draw.choice([None, None, 0]),
            ignore_eos=draw.random() < 0.7,
        )
        for _ in range(draw.randint(0, 3)):
            world.step()
        if draw.random() < 0.2:
            world.scheduler.abort(draw.randrange(len(world.sequences)))
    world.drain()
    return world


def random_loads(policy: str, **world: Any) -> None:
    for seed in range(10):
        random_load(World(policy, **world), seed)


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


class SchedulerMachine(RuleBasedStateMachine):
    """Anything at any time: arrivals, aborts between and during steps, runs that break off half-way."""

    @initialize(
        policy=st.just("fcfs") | st.integers(0, 2**16).map("chaos:{}".format),
        cached=st.booleans(),
        size=st.integers(1, 4),
        spare=st.integers(0, 4),
        batch_tokens=st.integers(1, 12),
        batch_sequences=st.integers(1, 5),
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
            for position in range(chunk.start, chunk.stop):
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

    def _admit(self, sequence: Sequence, draft: _Draft) -> bool:
        admitted = super()._admit(sequence, draft)
        if admitted and sequence.preemptions and sequence.remaining > 1:
            sequence.computed += 1
        return admitted


@pytest.mark.parametrize("policy", POLICIES)
def test_a_skipped_recomputation_is_caught(policy: str) -> None:
    with pytest.raises(AssertionError, match=r"the KV cache has other tokens|holds 0 blocks"):
        random_loads(policy, scheduler_type=ClaimsMoreThanItFound)


# One claim each.


class Preempt(FirstComeFirstServed):
    """First come, first served, but at the given calls of `interrupts` a sequence loses its blocks."""

    def __init__(self, calls: set[int]) -> None:
        self.calls, self.count = calls, 0

    def interrupts(self, sequence: Sequence) -> bool:
        self.count += 1
        return self.count in self.calls


class Takes(FirstComeFirstServed):
    def __init__(self, count: int) -> None:
        self.count = count

    def chunk(self, sequence: Sequence, most: int) -> int:
        return self.count


def spans(step: ScheduledStep | None) -> list[tuple[int, int, int]]:
    assert step is not None
    return [(chunk.sequence.id, chunk.start, chunk.stop) for chunk in step.chunks]


def test_decoding_comes_before_prompts_and_prompts_take_the_rest() -> None:
    world = World(batch_tokens=5, blocks=40, cached=False)
    world.add((1, 2, 1, 2))
    world.step()
    world.add((1,) * 7)
    world.add((2,) * 7)
    assert spans(world.step()) == [(0, 4, 5), (1, 0, 4)]
    assert world.scheduler.num_waiting == 1  # nobody is let in for whom no token is left
    assert spans(world.step()) == [(0, 5, 6), (1, 4, 7), (2, 0, 1)]


def test_a_later_decode_comes_before_an_earlier_prompt() -> None:
    world = World(Preempt({3}), batch_tokens=5, cached=False)
    world.add((1, 2))
    world.add((2, 1))
    world.step()
    assert spans(world.step()) == [(0, 2, 3), (1, 2, 3)]
    assert spans(world.step()) == [(1, 3, 4), (0, 0, 4)]


@pytest.mark.parametrize("small", [1, 2])  # a prompt of one token is not taken for a decoding sequence
def test_the_queue_is_not_overtaken_for_want_of_blocks(small: int) -> None:
    world = World(blocks=8, batch_tokens=100, cached=False)
    world.add((1,) * 10)  # 5 blocks
    world.add((2,) * 7)  # 4, one more than there are
    world.add((1,) * small)
    assert spans(world.step()) == [(0, 0, 10)]


def test_a_prompt_found_whole_still_computes_its_last_token() -> None:
    world = World()
    world.add((1, 2, 1, 2), max_tokens=1)
    world.drain()
    (again,) = world.add((1, 2, 1, 2), max_tokens=1)
    step = world.step()
    assert spans(step) == [(1, 2, 4)]
    assert again.cached_tokens == 2
    world.drain()


def test_a_second_turn_finds_the_first_turns_reply() -> None:
    world = World(blocks=20)
    (first,) = world.add((1, 2, 1, 2), max_tokens=4)
    world.drain()
    (second,) = world.add((*first.tokens(0, 8), 1, 1))
    world.drain()
    assert second.cached_tokens == 6  # the last token of a reply is never computed, so its block is not full


def test_prompt_logprobs_compute_every_position() -> None:
    world = World()
    world.add((1, 2, 1, 2, 1), max_tokens=1)
    world.drain()
    (again,) = world.add((1, 2, 1, 2, 1), max_tokens=1, prompt_logprobs=0)
    assert spans(world.step()) == [(1, 0, 5)]
    assert again.cached_tokens == 0


@pytest.mark.parametrize(("prompt", "hit"), [((1, 2, 1, 2, 1), 4), ((1, 2, 1, 2, 1, 2), 4)])
def test_completions_of_one_request_share_the_prompts_blocks(prompt: Tokens, hit: int) -> None:
    world = World(batch_tokens=100, batch_sequences=8, blocks=100)
    copies = world.add(prompt, max_tokens=1, copies=8)
    world.drain()
    assert world.steps == 2  # the others wait one step for the first, and not for each other
    assert world.computed == len(prompt) + 7 * (len(prompt) - hit)
    assert [copy.cached_tokens for copy in copies] == [0] + [hit] * 7


@pytest.mark.parametrize("other", [(1, 1, 1, 1, 1), (1, 2, 1, 2)])  # unlike; alike, but no block comes of it
def test_prompts_that_share_no_block_do_not_wait_for_each_other(other: Tokens) -> None:
    world = World(batch_tokens=100, blocks=100, size=4)
    world.add((1, 2, 1))
    world.add(other)
    assert spans(world.step()) == [(0, 0, 3), (1, 0, len(other))]


def test_a_preempted_sequence_recomputes_and_samples_no_token_twice() -> None:
    prompt = (1, 2, 1, 2)
    world = World(Preempt({2}), cached=False)
    (sequence,) = world.add(prompt)
    assert spans(world.step()) == [(0, 0, 4)]
    assert spans(world.step()) == [(0, 4, 5)]
    step = world.step()  # the second call of `interrupts`
    assert step is not None
    assert step.preempted == (0,)
    assert spans(step) == [(0, 0, 6)]
    assert len(sequence.output_ids) == 3
    assert sequence.preemptions == 1
    world.drain()


def test_a_preempted_sequence_finds_its_own_blocks() -> None:
    world = World(Preempt({2}))
    (sequence,) = world.add((1, 2, 1, 2))
    world.step()
    world.step()
    assert spans(world.step()) == [(0, 4, 6)]
    assert sequence.cached_tokens == 0  # nothing was cached when it came


def test_the_latest_arrival_gives_way() -> None:
    world = World(blocks=8, cached=False)
    first, second, third = world.add((1, 2), max_tokens=6, copies=3)
    while not (first.preemptions or second.preemptions or third.preemptions):
        world.step()
    assert (first.preemptions, second.preemptions, third.preemptions) == (0, 0, 1)
    world.drain()
    assert first.preemptions == 0


def test_a_preempted_sequence_goes_to_the_head_of_the_queue() -> None:
    world = World(Preempt({2}), batch_sequences=1)
    world.add((1, 2, 1, 2), max_tokens=3)
    world.add((2, 2, 2), max_tokens=1)
    order = []
    while (step := world.step()) is not None:
        order += [chunk.sequence.id for chunk in step.chunks]
    assert order == [0, 0, 0, 1]


def test_the_cache_loses_the_ends_of_prefixes_first() -> None:
    world = World(blocks=8)
    world.add((1,) * 9, max_tokens=1)  # 4 full blocks
    world.drain()
    world.add((2,) * 11, max_tokens=1)  # 6 blocks
    world.drain()
    assert world.cache is not None
    assert len(world.cache.match((1,) * 9)[0]) == 2


def test_an_uncommitted_step_is_planned_again() -> None:
    world = World()
    world.add((1, 2, 1))
    first, second = world.scheduler.schedule(), world.scheduler.schedule()
    assert first == second
    assert first is not second
    world.drain()


def test_a_reply_ends_where_the_context_does() -> None:
    prompt = (1, 2, 1, 2)
    world = World(context=10)
    (sequence,) = world.add(prompt, max_tokens=100)
    assert world.scheduler.token_limit(sequence) == 10
    world.drain()
    assert sequence.finish_reason is FinishReason.LENGTH
    assert len(sequence) == 10


@pytest.mark.parametrize(("reason", "hits"), [(FinishReason.ABORT, 2), (FinishReason.ERROR, 0)])
def test_a_failed_sequence_leaves_nothing_behind(reason: FinishReason, hits: int) -> None:
    world = World()
    (sequence,) = world.add((1, 2, 1, 2))
    world.step()
    assert world.cache is not None
    world.scheduler.finish(sequence, reason)
    assert len(world.cache.match((1, 2, 1, 2))[0]) == hits
    world.drain()


def test_a_waiting_sequence_can_be_aborted() -> None:
    world = World()
    (sequence,) = world.add((1,))
    assert world.scheduler.num_waiting == 1
    assert world.scheduler.abort(sequence.id)
    assert sequence.finish_reason is FinishReason.ABORT
    assert not world.scheduler.abort(sequence.id)
    assert not world.scheduler.abort(99)
    world.drain()


def test_no_work_is_no_step() -> None:
    assert World().scheduler.schedule() is None


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


# Typed errors.


@pytest.mark.parametrize(
    ("length", "got"), [(0, "got 0 tokens"), (16, "got 16 tokens"), (17, "got 17 tokens")]
)
def test_a_prompt_must_leave_room_in_the_context(length: int, got: str) -> None:
    with pytest.raises(PromptError, match=f"expected 1 to 15 tokens.*{got}"):
        World(context=16).add((1,) * length)


def test_the_longest_prompt_gets_its_one_token() -> None:
    world = World(context=16)
    (sequence,) = world.add((1,) * 15)
    world.drain()
    assert len(sequence.output_ids) == 1


def test_what_could_never_fit_is_refused_with_the_arithmetic() -> None:
    arithmetic = r"5 blocks x 2 = 10 tokens.*6 \+ max_tokens 5.*11 tokens in 6 blocks"
    world = World(blocks=5, size=2, context=100)
    world.add((1,) * 6, max_tokens=4)
    with pytest.raises(CapacityError, match=arithmetic):
        world.add((1,) * 6, max_tokens=5)
    world.drain()  # the refusal disturbed nobody


def test_two_sequences_cannot_have_one_id() -> None:
    world = World()
    (sequence,) = world.add((1, 2))
    with pytest.raises(IntegrityError, match="two sequences with the id 0"):
        world.scheduler.add(sequence)


def test_a_sequence_is_finished_once() -> None:
    world = World()
    (sequence,) = world.add((1, 2), max_tokens=1)
    world.drain()
    with pytest.raises(UnknownRequestError, match="id 0"):
        world.scheduler.finish(sequence, FinishReason.ABORT)


def test_only_the_latest_step_is_committed_and_only_once() -> None:
    world = World()
    world.add((1, 2, 1))
    stale, step = world.scheduler.schedule(), world.scheduler.schedule()
    assert stale is not None
    assert step is not None
    with pytest.raises(IntegrityError, match="a stale step"):
        world.scheduler.commit(stale)
    world.scheduler.commit(step)
    with pytest.raises(IntegrityError, match="a stale step"):
        world.scheduler.commit(step)


def test_a_step_is_stale_once_another_was_asked_for() -> None:
    world = World()
    (sequence,) = world.add((1, 2, 1))
    step = world.scheduler.schedule()
    assert step is not None
    world.scheduler.abort(sequence.id)
    assert world.scheduler.schedule() is None
    with pytest.raises(IntegrityError, match="a stale step"):
        world.scheduler.commit(step)


def test_a_sampled_token_must_be_appended() -> None:
    world = World()
    world.add((1, 2, 1))
    step = world.scheduler.schedule()
    assert step is not None
    world.scheduler.commit(step)
    with pytest.raises(IntegrityError, match="no token to compute"):
        world.scheduler.schedule()


def test_no_token_is_appended_that_was_not_sampled() -> None:
    (sequence,) = World().add((1, 2, 1))
    with pytest.raises(IntegrityError, match="3 tokens left"):
        sequence.append(1)


def test_no_token_is_appended_to_a_finished_sequence() -> None:
    world = World()
    (sequence,) = world.add((1, 2, 1), max_tokens=1)
    world.drain()
    with pytest.raises(IntegrityError, match="finish reason length"):
        sequence.append(1)


@pytest.mark.parametrize("count", [0, -1, 4])
def test_a_policy_cannot_take_too_much_or_nothing(count: int) -> None:
    world = World(Takes(count))
    world.add((1, 2, 1))
    with pytest.raises(IntegrityError, match=f"expected 1 to 3; got {count}"):
        world.step()


@pytest.mark.parametrize("name", ["batch_tokens", "batch_sequences", "context"])
def test_a_limit_below_one_is_a_config_error(name: str) -> None:
    limits: dict[str, Any] = {name: 0}
    with pytest.raises(ConfigError, match=f"max_{name}.* of 1 or more"):
        World(**limits)


@pytest.mark.parametrize("name", ["", "fcsf", "chaos", "chaos 1", "random:1"])
def test_an_unknown_policy_is_refused(name: str) -> None:
    with pytest.raises(UnknownKeyError, match="unknown scheduling policy"):
        policy_from_name(name)


@pytest.mark.parametrize("name", ["chaos:", "chaos:x", "chaos:1.5"])
def test_a_chaos_seed_is_an_integer(name: str) -> None:
    with pytest.raises(ConfigError, match="expected chaos:SEED"):
        policy_from_name(name)


def test_policies_are_found_by_name() -> None:
    assert isinstance(policy_from_name("fcfs"), FirstComeFirstServed)
    assert isinstance(policy_from_name("chaos:-5"), Chaos)


def test_check_notices_a_reference_that_is_nobodys() -> None:
    world = World()
    world.pool.allocate()
    with pytest.raises(IntegrityError, match="has the wrong count"):
        world.scheduler.check()


def test_check_notices_blocks_of_a_waiting_sequence() -> None:
    world = World()
    (sequence,) = world.add((1, 2, 1))
    sequence.computed = 1
    with pytest.raises(IntegrityError, match="a waiting sequence holds blocks"):
        world.scheduler.check()


def test_check_notices_a_node_that_is_nobodys() -> None:
    world = World()
    assert world.cache is not None
    world.scheduler._tips[7] = world.cache.root
    with pytest.raises(IntegrityError, match="the cache's nodes"):
        world.scheduler.check()


def test_check_notices_too_many_blocks() -> None:
    world = World(blocks=20)
    (sequence,) = world.add((1, 2, 1, 2))
    world.step()
    sequence.block_table.extend(world.pool.allocate() for _ in range(5))
    with pytest.raises(IntegrityError, match="sequence 0 holds"):
        world.scheduler.check()


def test_tokens_cross_from_prompt_to_reply() -> None:
    sequence = Sequence(id=0, prompt_ids=(1, 2, 3), params=SamplingParams(), seed=0, arrival=0)
    sequence.output_ids = [4, 5, 6]
    everything = (1, 2, 3, 4, 5, 6)
    for start in range(7):
        for stop in range(start, 7):
            assert sequence.tokens(start, stop) == everything[start:stop]
