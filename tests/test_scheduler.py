"""The scheduler, one claim at a time, against the fake model of tests.scheduler_world."""

from __future__ import annotations

from typing import Any

import pytest

from isobatch.engine.drafts import Drafter
from isobatch.engine.policies import Chaos, FirstComeFirstServed, policy_from_name
from isobatch.engine.request import PENDING, FinishReason, Sequence
from isobatch.engine.sampling_params import SamplingParams
from isobatch.engine.scheduled import ScheduledStep
from isobatch.errors import (
    CapacityError,
    ConfigError,
    IntegrityError,
    PromptError,
    UnknownKeyError,
    UnknownRequestError,
)
from tests.scheduler_world import VOCAB, Tokens, World, next_token, spans


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


class Has(FirstComeFirstServed):
    def __init__(self, count: int) -> None:
        self.count = count

    def drafts(self, sequence: Sequence, most: int) -> int:
        return self.count


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


# Drafts take what is left.


def drafts_of(step: ScheduledStep | None) -> list[tuple[int, int]]:
    assert step is not None
    return [(chunk.sequence.id, len(chunk.drafts)) for chunk in step.chunks]


class Drafts(Drafter):
    """Any number of drafts, all wrong."""

    def propose(self, most: int) -> Tokens:
        return tuple((next_token(tuple(self._tokens)) + 1) % VOCAB for _ in range(most))


def add_drafting(world: World, prompt: Tokens, **params: Any) -> Sequence:
    (sequence,) = world.add(prompt, **params)
    sequence.drafter = Drafts()
    return sequence


def test_drafts_come_after_all_tokens() -> None:
    world = World(batch_tokens=8, blocks=40, context=40, cached=False, draft_tokens=6)
    for prompt in ((1, 2), (2, 1)):
        add_drafting(world, prompt, max_tokens=20)
    assert drafts_of(world.step()) == [(0, 4), (1, 0)]
    assert drafts_of(world.step()) == [(0, 6), (1, 0)]
    world.add((1,) * 5)
    assert drafts_of(world.step()) == [(0, 1), (1, 0), (2, 0)]


def test_drafts_end_before_the_last_token() -> None:
    world = World(batch_tokens=20, blocks=40, draft_tokens=6)
    add_drafting(world, (1, 2), max_tokens=5)
    assert [drafts_of(world.step()) for _ in range(5)] == [[(0, n)] for n in (4, 3, 2, 1, 0)]


def test_drafts_preempt_nobody_and_give_their_blocks_back() -> None:
    world = World(blocks=4, size=2, context=8, batch_tokens=20, cached=False, draft_tokens=6)
    first, second = (add_drafting(world, prompt, max_tokens=6) for prompt in ((1, 2), (2, 1)))
    assert drafts_of(world.step()) == [(0, 4), (1, 0)]  # a block for each prompt, and the two that are left
    assert (len(first.block_table), len(second.block_table), world.pool.num_free) == (3, 1, 0)
    assert drafts_of(world.step()) == [(0, 1), (1, 1)]  # each needs a block now, and finds it free
    assert world.preempted == 0


def test_blocks_for_drafts_are_planned_with_again_after_a_step_that_failed() -> None:
    world = World(blocks=4, size=2, context=8, batch_tokens=20, cached=False, draft_tokens=6)
    add_drafting(world, (1, 2), max_tokens=6)
    assert drafts_of(world.scheduler.schedule()) == [(0, 5)]
    world.add((2, 1, 1, 1), max_tokens=1)
    assert drafts_of(world.step()) == [(0, 2), (1, 0)]


def test_pending_tokens_are_not_looked_up() -> None:
    world = World(draft_tokens=4)
    (sequence,) = world.add((1, 2, 1))
    step = world.scheduler.schedule()
    assert step is not None
    world.scheduler.commit(step)
    sequence.append(PENDING)
    assert drafts_of(world.scheduler.schedule()) == [(0, 0)]
    assert len(sequence.drafter) == 3


@pytest.mark.parametrize("count", [-1, 5])
def test_a_policy_cannot_have_drafts_that_there_are_not(count: int) -> None:
    world = World(Has(count), draft_tokens=4)
    add_drafting(world, (1, 2, 1), max_tokens=9)
    with pytest.raises(IntegrityError, match=f"expected 0 to 4; got {count}"):
        world.step()


def test_only_a_token_that_was_computed_is_accepted() -> None:
    world = World(draft_tokens=1)
    sequence = add_drafting(world, (1, 2, 1), max_tokens=9)
    step = world.scheduler.schedule()
    assert step is not None
    with pytest.raises(IntegrityError, match="3 left, 2 blocks"):
        world.scheduler.accept(sequence)
    world.scheduler.commit(step)
    with pytest.raises(IntegrityError, match="0 left, 2 blocks"):
        world.scheduler.accept(sequence)
    sequence.append(0)
    world.scheduler.accept(sequence)
    sequence.append(0)
    with pytest.raises(IntegrityError, match="1 left, 2 blocks"):
        world.scheduler.accept(sequence)


def test_tokens_cross_from_prompt_to_reply() -> None:
    sequence = Sequence(id=0, prompt_ids=(1, 2, 3), params=SamplingParams(), seed=0, arrival=0)
    sequence.output_ids = [4, 5, 6]
    everything = (1, 2, 3, 4, 5, 6)
    for start in range(7):
        for stop in range(start, 7):
            assert sequence.tokens(start, stop) == everything[start:stop]
