"""The world the scheduler is tried in: a fake model, the engine's loop, and requests drawn at random.

The fake KV cache remembers, per slot, the whole prefix that was computed into it, and every chunk looks at
every slot of its context before anything is written. A block handed out too early, freed twice, found under
another prompt's tokens or not recomputed shows up as a wrong prefix in some slot.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from isobatch.engine.block_pool import BlockPool
from isobatch.engine.drafts import Drafter
from isobatch.engine.policies import Policy, policy_from_name
from isobatch.engine.prefix_cache import PrefixCache
from isobatch.engine.request import FinishReason, Sequence
from isobatch.engine.sampling_params import SamplingParams
from isobatch.engine.scheduled import ScheduledStep
from isobatch.engine.scheduler import Scheduler

Tokens = tuple[int, ...]
VOCAB, EOS = 3, 0  # few token ids, so that prompts share prefixes and replies meet again


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


class Guesser(Drafter):
    """Knows the model, and errs all the same: drafts that are right, wrong, and right up to any place."""

    def propose(self, most: int) -> Tokens:
        state = sum(self._tokens) + len(self._tokens)
        drafts: list[int] = []
        for at in range((state % 5) * most // 4):
            wrong = (state * 31 + at * 17) % 4 == 0
            drafts.append((next_token((*self._tokens, *drafts)) + wrong) % VOCAB)
        return tuple(drafts)


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
        draft_tokens: int = 0,
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
            draft_tokens=draft_tokens,
        )
        self.batch_tokens, self.batch_sequences, self.context = batch_tokens, batch_sequences, context
        self.kv: dict[tuple[int, int], Tokens] = {}
        self.sequences: list[Sequence] = []
        self.seen: dict[int, set[int]] = {}  # positions whose logits were computed
        self.steps = self.computed = self.preempted = self.drafted = self.accepted = 0

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
            sequence.drafter = Guesser()
            self.scheduler.add(sequence)
            self.sequences.append(sequence)
            self.seen[sequence.id] = set()
            added.append(sequence)
        return added

    def slot(self, table: Tokens, position: int) -> tuple[int, int]:
        return table[position // self.pool.block_size], position % self.pool.block_size

    def compute(self, step: ScheduledStep) -> dict[int, list[int]]:
        """Run the fake model on a step and return what each sampling sequence says after token and drafts."""
        read, written = set(), {}
        for chunk in step.chunks:
            sequence = chunk.sequence
            assert chunk.token_ids == sequence.tokens(chunk.start, chunk.stop)
            assert not chunk.drafts or chunk.samples
            assert chunk.end < self.scheduler.token_limit(sequence), "what cannot be sampled from is computed"
            content = sequence.tokens(0, chunk.stop) + chunk.drafts
            for position in range(chunk.start):
                slot = self.slot(chunk.block_table, position)
                read.add(slot)
                assert self.kv.get(slot) == sequence.tokens(0, position + 1), "the KV cache has other tokens"
            for position in range(chunk.start, chunk.end):
                slot = self.slot(chunk.block_table, position)
                assert slot not in written, "two sequences write one slot"
                written[slot] = content[: position + 1]
            self.seen[sequence.id].update(range(chunk.start, chunk.stop))
        assert read.isdisjoint(written), "a slot is read and written in one step"
        assert sum(c.end - c.start for c in step.chunks) == len(written) <= self.batch_tokens
        assert len({chunk.sequence.id for chunk in step.chunks}) == len(step.chunks) <= self.batch_sequences
        self.kv.update(written)
        return {
            chunk.sequence.id: [
                next_token(written[self.slot(chunk.block_table, position)])
                for position in range(chunk.stop - 1, chunk.end)
            ]
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
            self.drafted += len(chunk.drafts)
            for token, draft in zip(sampled[sequence.id], (*chunk.drafts, None), strict=True):
                self.take(sequence, token)
                if sequence.finish_reason is not None or draft is None or not self.agree(token, draft):
                    break
                self.scheduler.accept(sequence)
                self.accepted += 1
        self.scheduler.check()
        self.steps += 1
        self.computed += sum(len(chunk.token_ids) for chunk in step.chunks)
        self.preempted += len(step.preempted)
        return step

    def take(self, sequence: Sequence, token: int) -> None:
        sequence.append(token)
        if is_stopped(sequence.output_ids, sequence.params):
            self.scheduler.finish(sequence, FinishReason.STOP)
        elif len(sequence) == self.scheduler.token_limit(sequence):
            self.scheduler.finish(sequence, FinishReason.LENGTH)

    def agree(self, token: int, draft: int) -> bool:
        """Whether a draft is what was said at its place; a fault may think otherwise."""
        return token == draft

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


def random_loads(policy: str, world_type: type[World] = World, **world: Any) -> list[World]:
    return [random_load(world_type(policy, **world), seed) for seed in range(10)]


def spans(step: ScheduledStep | None) -> list[tuple[int, int, int]]:
    assert step is not None
    return [(chunk.sequence.id, chunk.start, chunk.stop) for chunk in step.chunks]
