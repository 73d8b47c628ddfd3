"""The prefix cache: what it finds is what was put there, token by token, whatever was evicted meanwhile."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from isobatch.engine.block_pool import BlockPool
from isobatch.engine.prefix_cache import Node, PrefixCache
from isobatch.errors import IntegrityError

SIZE = 2
Tokens = tuple[int, ...]


def store(pool: BlockPool, cache: PrefixCache, tokens: Tokens) -> list[int]:
    """Compute every full block anew, as a sequence that uses no hits would; the caller holds the blocks."""
    node, blocks = cache.root, []
    for start in range(0, len(tokens) - SIZE + 1, SIZE):
        blocks.append(pool.allocate())
        node = cache.insert(node, tokens[start : start + SIZE], blocks[-1])
    return blocks


def release(pool: BlockPool, blocks: list[int]) -> None:
    for block in reversed(blocks):
        pool.decref(block)


@pytest.fixture
def pool() -> BlockPool:
    return BlockPool(6, SIZE)


@pytest.fixture
def cache(pool: BlockPool) -> PrefixCache:
    return PrefixCache(pool)


@pytest.mark.parametrize(
    ("tokens", "hits"),
    [
        ((), 0),
        ((1,), 0),  # not a block
        ((1, 2), 1),
        ((1, 2, 3), 1),
        ((1, 2, 3, 4), 2),
        ((1, 2, 3, 4, 5, 6, 7), 2),
        ((1, 2, 9, 4), 1),  # differs in the second block
        ((9, 2, 3, 4), 0),  # differs in the first: the second cannot count
        ((3, 4), 0),  # the right tokens at the wrong position
    ],
)
def test_the_longest_prefix_of_full_blocks_is_found(
    pool: BlockPool, cache: PrefixCache, tokens: Tokens, hits: int
) -> None:
    blocks = store(pool, cache, (1, 2, 3, 4))
    assert cache.match(tokens)[0] == blocks[:hits]


def test_hits_survive_their_holder(pool: BlockPool, cache: PrefixCache) -> None:
    blocks = store(pool, cache, (1, 2, 3, 4))
    release(pool, blocks)
    assert cache.match((1, 2, 3, 4))[0] == blocks
    assert pool.num_free == pool.num_blocks
    cache.check()


def test_the_second_of_two_equal_blocks_stays_private(pool: BlockPool, cache: PrefixCache) -> None:
    first = store(pool, cache, (1, 2))
    second = store(pool, cache, (1, 2, 3, 4))
    assert cache.match((1, 2, 3, 4))[0] == [first[0], second[1]]
    assert not pool.is_kept(second[0])
    cache.check()


def test_prefixes_are_evicted_from_their_ends(pool: BlockPool, cache: PrefixCache) -> None:
    tokens = (1, 2, 3, 4, 5, 6)
    release(pool, store(pool, cache, tokens))
    for _ in range(3):
        pool.allocate()  # the blank ones
    for left in (2, 1, 0):
        pool.allocate()
        assert len(cache.match(tokens)[0]) == left
        cache.check()


def test_what_hangs_below_an_evicted_block_leaves_with_it(pool: BlockPool, cache: PrefixCache) -> None:
    first = store(pool, cache, (1, 2))
    second = store(pool, cache, (1, 2, 3, 4, 5, 6))  # its tail hangs below a block it does not hold
    release(pool, first)
    for _ in range(3):
        pool.allocate()
    assert len(cache) == 0
    assert cache.match((1, 2, 3, 4, 5, 6))[0] == []
    cache.check()
    pool.check()
    release(pool, second)
    assert pool.num_free == 3
    pool.check()


def test_nothing_is_inserted_below_a_lost_parent(pool: BlockPool, cache: PrefixCache) -> None:
    block = pool.allocate()
    parent = cache.insert(cache.root, (1, 2), block)
    cache.forget(block)
    assert cache.insert(parent, (3, 4), pool.allocate()) is parent
    assert len(cache) == 0
    assert not parent.children
    cache.check()
    pool.check()


def test_forgetting_an_idle_prefix_makes_its_blocks_blank(pool: BlockPool, cache: PrefixCache) -> None:
    blocks = store(pool, cache, (1, 2, 3, 4))
    release(pool, blocks)
    nodes = [cache.root.children[1, 2], cache.root.children[1, 2].children[3, 4]]
    cache.forget(blocks[0])
    cache.forget(blocks[0])  # not cached any more: left alone
    assert not any(node.live or node.children for node in nodes)
    assert pool.num_kept == 0
    assert pool.num_free == pool.num_blocks
    pool.check()


def test_equal_hashes_are_not_equal_prefixes(pool: BlockPool, cache: PrefixCache) -> None:
    # In CPython -1 and -2 hash alike, and so do tuples of them: a collision made to order.
    assert hash((-1, 1)) == hash((-2, 1))
    store(pool, cache, (-1, 1))
    assert cache.match((-2, 1))[0] == []


def test_a_partial_block_is_refused(pool: BlockPool, cache: PrefixCache) -> None:
    with pytest.raises(IntegrityError, match="got 1 tokens"):
        cache.insert(cache.root, (1,), pool.allocate())


def test_a_block_has_one_content(pool: BlockPool, cache: PrefixCache) -> None:
    block = pool.allocate()
    cache.insert(cache.root, (1, 2), block)
    with pytest.raises(IntegrityError, match="known"):
        cache.insert(cache.root, (3, 4), block)


def test_check_notices_a_torn_tree(pool: BlockPool, cache: PrefixCache) -> None:
    store(pool, cache, (1, 2, 3, 4))
    (node,) = cache.root.children.values()
    node.live = False
    with pytest.raises(IntegrityError, match="torn"):
        cache.check()


def test_check_notices_an_unreachable_node(pool: BlockPool, cache: PrefixCache) -> None:
    store(pool, cache, (1, 2, 3, 4))
    cache.root.children.clear()
    with pytest.raises(IntegrityError, match="lost track"):
        cache.check()


def test_check_notices_a_pool_that_keeps_something_else(pool: BlockPool, cache: PrefixCache) -> None:
    pool.keep(pool.allocate())
    with pytest.raises(IntegrityError, match="keeps other blocks"):
        cache.check()


class CacheMachine(RuleBasedStateMachine):
    """Holders come and go over few blocks and two token ids, so that everything collides and is evicted."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(8, SIZE)
        self.cache = PrefixCache(self.pool)
        self.written: dict[int, Tokens] = {}  # block -> the whole prefix up to its end
        self.holders: list[tuple[Tokens, list[int], Node]] = []

    prompts = st.lists(st.integers(0, 1), max_size=8).map(tuple)

    @rule(tokens=prompts, use_hits=st.booleans())
    def hold(self, tokens: Tokens, use_hits: bool) -> None:
        blocks, node = self.cache.match(tokens) if use_hits else ([], self.cache.root)
        for index, block in enumerate(blocks):
            assert self.written[block] == tokens[: (index + 1) * SIZE], "a hit has other tokens"
            self.pool.incref(block)
        self.holders.append(((), blocks, node))
        self.extend(len(self.holders) - 1, tokens[len(blocks) * SIZE :])

    @precondition(lambda self: self.holders)
    @rule(which=st.integers(0, 99), tokens=prompts)
    def extend(self, which: int, tokens: Tokens) -> None:
        _, blocks, node = self.holders[which % len(self.holders)]
        prefix = self.written[blocks[-1]] if blocks else ()
        for start in range(0, len(tokens) - SIZE + 1, SIZE):
            if not self.pool.num_free:
                break
            prefix += tokens[start : start + SIZE]
            blocks.append(self.pool.allocate())
            self.written[blocks[-1]] = prefix
            node = self.cache.insert(node, tokens[start : start + SIZE], blocks[-1])
        self.holders[which % len(self.holders)] = (prefix, blocks, node)

    @precondition(lambda self: self.holders)
    @rule(which=st.integers(0, 99), fails=st.booleans())
    def leave(self, which: int, fails: bool) -> None:
        _, blocks, _ = self.holders.pop(which % len(self.holders))
        for block in blocks if fails else ():
            self.cache.forget(block)
        release(self.pool, blocks)

    @invariant()
    def sound(self) -> None:
        self.pool.check()
        self.cache.check()
        for prefix, blocks, _ in self.holders:
            for index, block in enumerate(blocks):
                assert self.written[block] == prefix[: (index + 1) * SIZE], "a held block was overwritten"

    def teardown(self) -> None:
        while self.holders:
            self.leave(0, False)
        assert self.pool.num_free == self.pool.num_blocks


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestCacheMachine = CacheMachine.TestCase
