"""Which tokens are computed in the next step, and in which KV blocks. Plain Python, plain integers.

The scheduler is *untrusted*: it decides when a token is computed and where its keys and values lie, and no
bit of any reply depends on either. It may therefore follow any policy, however wild, and it never deadlocks:

- The first running sequence in a step's order goes on. If no block is free, others that are not yet in the
  step give theirs up; a sequence alone always fits, for `add` has refused what would not.
- A sequence waits without blocks. So with nobody running every block is free, and somebody is admitted.

The engine's loop: `schedule`, run the chunks, `commit`, append a token to each sequence whose chunk samples,
`finish` those that are over. A step that is never committed, because running it failed, is planned again.

An appended token may be PENDING while the device still computes it. The next step may be planned and queued
behind it all the same: a chunk that ends in it gets it on the device. A sequence whose last token it is to be
is passed over, since with it the sequence is over.

What is left of a step's tokens and blocks goes to drafts, guesses behind the last known token: they preempt
nobody. Only `accept` counts one as computed; blocks that drafts alone needed go back before the next step.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from itertools import islice

from isobatch.engine.block_pool import BlockPool
from isobatch.engine.holdings import check_holdings
from isobatch.engine.policies import Policy
from isobatch.engine.prefix_cache import Node, PrefixCache
from isobatch.engine.request import FinishReason, Sequence
from isobatch.engine.scheduled import Chunk, Plan, ScheduledStep
from isobatch.errors import CapacityError, ConfigError, IntegrityError, PromptError, UnknownRequestError


class Scheduler:
    """Keeps the queue, the running sequences and their blocks.

    Args:
        pool: the KV blocks, used by nobody else.
        prefix_cache: over the same pool; None to compute every prefix anew.
        policy: order, chunk sizes, preemptions.
        max_batch_tokens: the most tokens in one step; may be changed between steps.
        max_batch_sequences: the most sequences running at once.
        max_context: the most tokens of prompt and reply together, in tokens.
        draft_tokens: the most drafts of a sequence in one step.

    Raises:
        ConfigError: a limit below 1, or drafts below 0.

    Determinism: replies do not depend on anything decided here; see the module's own text.
    """

    def __init__(
        self,
        pool: BlockPool,
        prefix_cache: PrefixCache | None,
        policy: Policy,
        *,
        max_batch_tokens: int,
        max_batch_sequences: int,
        max_context: int,
        draft_tokens: int = 0,
    ) -> None:
        if min(max_batch_tokens, max_batch_sequences, max_context, draft_tokens + 1) < 1:
            raise ConfigError(
                "a scheduler that could run nothing",
                expected="max_batch_tokens, max_batch_sequences, max_context of 1 or more, draft_tokens of 0",
                got=f"{max_batch_tokens}, {max_batch_sequences}, {max_context} and {draft_tokens}",
            )
        self._pool = pool
        self._cache = prefix_cache
        self._policy = policy
        self.max_batch_tokens = max_batch_tokens
        self._max_batch_sequences = max_batch_sequences
        self._max_context = max_context
        self._draft_tokens = draft_tokens
        self._waiting: OrderedDict[int, Sequence] = OrderedDict()
        self._running: dict[int, Sequence] = {}
        self._tips: dict[int, Node] = {}  # per running sequence, the cache's node of its last full block
        self._planned: ScheduledStep | None = None

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self._waiting or self._running)

    @property
    def num_waiting(self) -> int:
        """Sequences without blocks, new or preempted."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences with blocks."""
        return len(self._running)

    def token_limit(self, sequence: Sequence) -> int:
        """Return how many tokens, prompt and reply together, the sequence may have: with these it is over.

        Args:
            sequence: any.

        Returns:
            Prompt plus `max_tokens`, or `max_context` where that is less. Either way it ends as `length`.
        """
        return min(len(sequence.prompt_ids) + sequence.params.max_tokens, self._max_context)

    def require_room(self, prompt: int, max_tokens: int) -> None:
        """Refuse what could never run to its end.

        Args:
            prompt: its length in tokens.
            max_tokens: as in the sampling parameters.

        Raises:
            PromptError: the prompt is empty, or leaves no room in the context for even one token.
            CapacityError: a sequence of that length would not fit even if it had every block.
        """
        if not 1 <= prompt < self._max_context:
            raise PromptError(
                "a prompt that cannot be continued",
                expected=f"1 to {self._max_context - 1} tokens, one less than the context",
                got=f"{prompt} tokens",
                fix="shorten the prompt" if prompt else "pass at least one token",
            )
        limit = min(prompt + max_tokens, self._max_context)
        blocks, size = self._pool.num_blocks, self._pool.block_size
        if self._blocks_for(limit) > blocks:
            raise CapacityError(
                "a request that could never fit in the KV cache",
                expected=f"at most {blocks} blocks x {size} = {blocks * size} tokens",
                got=f"prompt {prompt} + max_tokens {max_tokens}, at most context "
                f"{self._max_context}: {limit} tokens in {self._blocks_for(limit)} blocks",
                fix="shorten the prompt, lower max_tokens, or give the KV cache more memory",
            )

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of the queue.

        Args:
            sequence: with an id that no unfinished sequence has.

        Raises:
            PromptError, CapacityError: as `require_room`.
            IntegrityError: the id is taken.
        """
        self.require_room(len(sequence.prompt_ids), sequence.params.max_tokens)
        if sequence.id in self._waiting or sequence.id in self._running:
            raise IntegrityError(f"two sequences with the id {sequence.id}")
        self._waiting[sequence.id] = sequence

    def abort(self, sequence_id: int) -> bool:
        """Drop a sequence, also in the middle of a step.

        Args:
            sequence_id: any id.

        Returns:
            Whether there was such a sequence, unfinished.
        """
        sequence = self._running.get(sequence_id, self._waiting.get(sequence_id))
        if sequence is None:
            return False
        self.finish(sequence, FinishReason.ABORT)
        return True

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence and give its blocks back; the prefix cache goes on knowing the full ones.

        Args:
            sequence: waiting or running here.
            reason: recorded in the sequence. After `ERROR` the cache forgets its blocks: nothing that a
                failed sequence wrote is served to another.

        Raises:
            UnknownRequestError: the sequence is not here, or no longer.
        """
        if self._waiting.pop(sequence.id, None) is None:
            if sequence.id not in self._running:
                raise UnknownRequestError(f"no unfinished sequence has the id {sequence.id}")
            if reason is FinishReason.ERROR and self._cache is not None:
                for block in sequence.block_table:
                    self._cache.forget(block)
            self._release(sequence)
        sequence.finish_reason = reason

    def schedule(self) -> ScheduledStep | None:
        """Plan the next step. Blocks are assigned; nothing counts as computed until `commit`.

        Returns:
            The step, with at least one chunk, or None if there is no work, or none before pending tokens.

        Raises:
            IntegrityError: a sequence was sampled but got no token, the policy answered out of range, or
                nothing can go on.
        """
        self._planned = None
        if not self.has_work:
            return None
        plan = Plan(budget=self.max_batch_tokens)
        for sequence in list(self._running.values()):
            if self._policy.interrupts(sequence):
                self._preempt(sequence, plan)
            elif self._draft_tokens:
                self._trim(sequence)
        # No more than this many can be admitted in a step, so a long queue costs no more than a short one.
        queue = islice(self._waiting.values(), self._max_batch_sequences)
        passed_over = False
        for sequence in sorted([*self._running.values(), *queue], key=self._policy.rank):
            if plan.budget == 0:
                break
            if sequence.pending and len(sequence) >= self.token_limit(sequence):
                passed_over = True
            elif sequence.id in self._running or self._admit(sequence, plan):
                self._place(sequence, plan)
        if not plan.chunks and passed_over:
            return None
        if not plan.chunks:
            raise IntegrityError("no sequence can go on", got=f"{self.num_running} running, all blocks taken")
        if self._draft_tokens:
            self._add_drafts(plan)
        self._planned = ScheduledStep(tuple(plan.chunks.values()), tuple(plan.preempted))
        return self._planned

    def commit(self, step: ScheduledStep) -> None:
        """Record that the step has been run: its tokens are computed, and its full blocks become known.

        Its drafts are not: see `accept`.

        Args:
            step: the latest from `schedule`, not committed before. Sequences finished since are passed over.

        Raises:
            IntegrityError: any other step.
        """
        if step is not self._planned:
            raise IntegrityError("a stale step", expected="the latest from schedule(), committed once")
        self._planned = None
        for chunk in step.chunks:
            if chunk.sequence.finish_reason is None:
                self._count(chunk.sequence, chunk.stop)

    def accept(self, sequence: Sequence) -> None:
        """Record that the last known token, drawn just now, is computed: it was the draft at its place.

        Args:
            sequence: whose chunk of the step committed last had that draft. It needs another token now.

        Raises:
            IntegrityError: it has other tokens to compute, or no block for this one.
        """
        if sequence.remaining != 1 or len(sequence.block_table) < self._blocks_for(len(sequence)):
            raise IntegrityError(
                f"sequence {sequence.id} cannot have computed its last token",
                expected="1 token left to compute, and a block for it",
                got=f"{sequence.remaining} left, {len(sequence.block_table)} blocks",
            )
        self._count(sequence, len(sequence))

    def check(self) -> None:
        """Verify the pool, the cache, and that every reference is a running sequence's. Slow; for tests.

        Raises:
            IntegrityError: something does not add up.
        """
        running, waiting, nodes = self._running.values(), self._waiting.values(), self._tips.keys()
        check_holdings(self._pool, self._cache, running, waiting, nodes=nodes, most=self.token_limit)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._pool.block_size)

    def _admit(self, sequence: Sequence, plan: Plan) -> bool:
        """Let a waiting sequence run, on the blocks the cache has for it, if the rest of it would fit."""
        if not plan.admitting or len(self._running) >= self._max_batch_sequences:
            return False
        size = self._pool.block_size
        hits: list[int] = []
        if self._cache is not None:
            tip = self._cache.root
            # Log-probs of the prompt need logits at each of its positions, and a hit would skip them. For the
            # same reason no hit covers the last known token: it is the one that is sampled from.
            if sequence.params.prompt_logprobs is None:
                tokens = sequence.tokens(0, len(sequence) - 1)
                hits, tip = self._cache.match(tokens)
                if (tip, tokens[len(hits) * size :][:size]) in plan.filling:
                    return False  # somebody in this very step computes its next block: a hit, one step later
            self._tips[sequence.id] = tip
        for block in hits:
            self._pool.incref(block)
        sequence.block_table = hits
        if self._blocks_for(len(sequence)) - len(hits) > self._pool.num_free:
            self._release(sequence)
            plan.admitting = False  # the next in the queue must not overtake for being small
            return False
        sequence.computed = len(hits) * size
        if not sequence.preemptions:
            sequence.cached_tokens = sequence.computed
        del self._waiting[sequence.id]
        self._running[sequence.id] = sequence
        return True

    def _place(self, sequence: Sequence, plan: Plan) -> None:
        """Give a running sequence its chunk of the step, unless there is no block for it."""
        remaining = sequence.remaining
        if not remaining:
            raise IntegrityError(f"sequence {sequence.id} has no token to compute", expected="one appended")
        most = min(self._room(sequence, plan), remaining, plan.budget)
        if most == 0:
            return
        count = self._policy.chunk(sequence, most)
        if not 1 <= count <= most:
            raise IntegrityError("a policy's chunk is out of range", expected=f"1 to {most}", got=count)
        start, stop = sequence.computed, sequence.computed + count
        self._reserve(sequence, stop)
        table = tuple(sequence.block_table)
        tokens = sequence.tokens(start, stop)
        plan.chunks[sequence.id] = Chunk(sequence, start, tokens, table, samples=count == remaining)
        plan.budget -= count
        index = start // self._pool.block_size
        if self._cache is not None and stop >= (index + 1) * self._pool.block_size:
            plan.filling.add((self._tips[sequence.id], self._block_tokens(sequence, index)))

    def _add_drafts(self, plan: Plan) -> None:
        """Give what is left of the step to drafts, in the order of the chunks."""
        for chunk in plan.chunks.values():
            sequence, drafter = chunk.sequence, chunk.sequence.drafter
            if sequence.pending:
                continue  # nothing can be looked up before its last token is known
            drafter.extend(sequence.tokens(len(drafter), chunk.stop))
            room = (len(sequence.block_table) + self._pool.num_free) * self._pool.block_size - chunk.stop
            # The last token that a sequence may have is never computed, so neither is a draft in its place.
            most = min(self._draft_tokens, plan.budget, room, self.token_limit(sequence) - 1 - chunk.stop)
            drafts = drafter.propose(most) if chunk.samples and most > 0 else ()
            if not drafts:
                continue
            count = self._policy.drafts(sequence, len(drafts))
            if not 0 <= count <= len(drafts):
                said = f"0 to {len(drafts)}"
                raise IntegrityError("a policy's drafts are out of range", expected=said, got=count)
            self._reserve(sequence, chunk.stop + count)
            table = tuple(sequence.block_table)
            plan.chunks[sequence.id] = replace(chunk, drafts=drafts[:count], block_table=table)
            plan.budget -= count

    def _reserve(self, sequence: Sequence, tokens: int) -> None:
        """Give a sequence blocks for so many tokens; they are free."""
        while len(sequence.block_table) < self._blocks_for(tokens):
            sequence.block_table.append(self._pool.allocate())

    def _trim(self, sequence: Sequence) -> None:
        """Take back the blocks that were for drafts alone."""
        while len(sequence.block_table) > self._blocks_for(len(sequence)):
            self._pool.decref(sequence.block_table.pop())

    def _count(self, sequence: Sequence, computed: int) -> None:
        """Count a sequence's tokens as computed; the cache gets to know the blocks that they fill."""
        first, sequence.computed = sequence.computed, computed
        if self._cache is None:
            return
        tip, size = self._tips[sequence.id], self._pool.block_size
        for index in range(first // size, computed // size):
            tip = self._cache.insert(tip, self._block_tokens(sequence, index), sequence.block_table[index])
        self._tips[sequence.id] = tip

    def _room(self, sequence: Sequence, plan: Plan) -> int:
        """Return how many more tokens there are blocks for, preempting others rather than returning 0."""
        size = self._pool.block_size
        while not (room := (len(sequence.block_table) + self._pool.num_free) * size - sequence.computed):
            # Whoever is in the step keeps its blocks: they are about to be read. If that leaves nobody, the
            # sequence sits this step out.
            out = (other for other in self._running.values() if other.id not in plan.chunks)
            others = [other for other in out if other is not sequence]
            if not others:
                break
            self._preempt(self._policy.victim(others), plan)
        return room

    def _block_tokens(self, sequence: Sequence, index: int) -> tuple[int, ...]:
        size = self._pool.block_size
        return sequence.tokens(index * size, (index + 1) * size)

    def _preempt(self, sequence: Sequence, plan: Plan) -> None:
        """Take a running sequence's blocks away and put it at the head of the queue."""
        self._release(sequence)
        sequence.preemptions += 1
        self._waiting[sequence.id] = sequence
        self._waiting.move_to_end(sequence.id, last=False)
        plan.preempted.append(sequence.id)

    def _release(self, sequence: Sequence) -> None:
        """Give all blocks back, the last first, so that the cache loses prefixes from their ends."""
        for block in reversed(sequence.block_table):
            self._pool.decref(block)
        sequence.block_table = []
        sequence.computed = 0
        self._tips.pop(sequence.id, None)
        self._running.pop(sequence.id, None)
