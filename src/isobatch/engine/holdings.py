"""Whether a scheduler's books add up: every block held by exactly those who say so. Slow; for tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Set

from isobatch.engine.block_pool import BlockPool
from isobatch.engine.prefix_cache import PrefixCache
from isobatch.engine.request import Sequence
from isobatch.errors import IntegrityError


def check_holdings(
    pool: BlockPool,
    cache: PrefixCache | None,
    running: Collection[Sequence],
    waiting: Iterable[Sequence],
    *,
    nodes: Set[int],
    most: Callable[[Sequence], int],
) -> None:
    """Verify the pool, the cache, and that every reference is a running sequence's.

    Args:
        pool: the KV blocks.
        cache: over the same pool, or None.
        running: the sequences with blocks.
        waiting: those without.
        nodes: the ids of the sequences whose place in the cache is known.
        most: how many tokens a sequence may have.

    Raises:
        IntegrityError: something does not add up.
    """
    pool.check()
    if cache is not None:
        cache.check()
    size = pool.block_size
    holders: Counter[int] = Counter()
    content: dict[int, tuple[int, ...]] = {}
    for sequence in running:
        holders.update(sequence.block_table)
        if not sequence.computed <= len(sequence.block_table) * size < most(sequence) + size:
            raise IntegrityError(f"sequence {sequence.id} holds {len(sequence.block_table)} blocks")
        for index, block in enumerate(sequence.block_table):
            prefix = sequence.tokens(0, min((index + 1) * size, len(sequence)))
            shared = content.setdefault(block, prefix)
            if pool.references(block) > 1 and (shared != prefix or len(prefix) % size):
                raise IntegrityError(f"block {block} is shared by sequences that differ")
    for block in range(pool.num_blocks):
        if pool.references(block) != holders[block]:
            raise IntegrityError(
                f"block {block} has the wrong count",
                expected=f"{holders[block]} holders",
                got=pool.references(block),
            )
    if any(sequence.block_table or sequence.computed for sequence in waiting):
        raise IntegrityError("a waiting sequence holds blocks")
    if nodes != (set() if cache is None else {sequence.id for sequence in running}):
        raise IntegrityError("the cache's nodes are not those of the running sequences")
