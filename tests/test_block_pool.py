"""The block pool: each block held, blank or idle, never two of them; and an alarm that rings."""

from __future__ import annotations

import pytest

from isobatch.engine.block_pool import BlockPool
from isobatch.errors import ConfigError, IntegrityError


def drain(pool: BlockPool) -> list[int]:
    return [pool.allocate() for _ in range(pool.num_free)]


def test_each_block_is_handed_out_once() -> None:
    pool = BlockPool(5, 4)
    assert sorted(drain(pool)) == [0, 1, 2, 3, 4]
    assert pool.num_free == 0
    pool.check()


def test_an_empty_pool_refuses() -> None:
    pool = BlockPool(1, 4)
    pool.allocate()
    with pytest.raises(IntegrityError, match="no block is free"):
        pool.allocate()


@pytest.mark.parametrize(("blocks", "size"), [(0, 4), (4, 0), (-1, 4)])
def test_a_pool_without_room_is_a_config_error(blocks: int, size: int) -> None:
    with pytest.raises(ConfigError, match=f"got {blocks} blocks of {size} tokens"):
        BlockPool(blocks, size)


def test_a_block_is_free_when_its_last_holder_leaves() -> None:
    pool = BlockPool(2, 4)
    block = pool.allocate()
    pool.incref(block)
    assert pool.references(block) == 2
    pool.decref(block)
    assert pool.num_free == 1
    pool.decref(block)
    assert pool.num_free == 2
    pool.check()


def test_freeing_twice_is_caught_at_once() -> None:
    pool = BlockPool(2, 4)
    block = pool.allocate()
    pool.decref(block)
    with pytest.raises(IntegrityError, match=f"block {block} was freed twice"):
        pool.decref(block)


def test_a_blank_block_cannot_be_shared_nor_kept() -> None:
    pool = BlockPool(2, 4)
    with pytest.raises(IntegrityError, match="block 0 was shared"):
        pool.incref(0)
    with pytest.raises(IntegrityError, match="block 0 was kept"):
        pool.keep(0)


def test_a_kept_block_comes_back_with_its_content() -> None:
    pool = BlockPool(2, 4)
    block = pool.allocate()
    pool.keep(block)
    pool.decref(block)
    assert pool.is_kept(block)
    assert pool.num_free == 2
    pool.check()
    pool.incref(block)
    assert pool.num_free == 1
    pool.check()


def test_blank_blocks_go_first_then_the_least_recently_used() -> None:
    pool = BlockPool(4, 4)
    evicted: list[int] = []
    pool.on_evict = evicted.append
    first, second, third, plain = drain(pool)
    for block in (first, second, third):
        pool.keep(block)
    for block in (first, second, third, plain):
        pool.decref(block)
    pool.incref(first)  # used again: now the most recent
    pool.decref(first)
    assert drain(pool) == [plain, second, third, first]
    assert evicted == [second, third, first]
    assert pool.num_kept == 0
    pool.check()


def test_an_idle_block_nobody_remembers_becomes_blank() -> None:
    pool = BlockPool(2, 4)
    pool.on_evict = lambda block: pytest.fail("a blank block has nothing to evict")
    block = pool.allocate()
    pool.keep(block)
    pool.decref(block)
    pool.unkeep(block)
    assert pool.num_kept == 0
    pool.check()
    assert sorted(drain(pool)) == [0, 1]


def test_a_held_block_nobody_remembers_stays_held() -> None:
    pool = BlockPool(1, 4)
    block = pool.allocate()
    pool.keep(block)
    pool.unkeep(block)
    assert pool.num_free == 0
    pool.decref(block)
    assert pool.num_free == 1
    pool.check()


# The alarm itself: each way of losing track must be noticed by check().


def test_check_notices_a_block_listed_twice() -> None:
    pool = BlockPool(3, 4)
    pool._blank.append(pool._blank[0])
    with pytest.raises(IntegrityError, match="lost track"):
        pool.check()


def test_check_notices_a_lost_block() -> None:
    pool = BlockPool(3, 4)
    pool._blank.pop()
    with pytest.raises(IntegrityError, match="lost track"):
        pool.check()


def test_check_notices_a_held_block_on_the_free_list() -> None:
    pool = BlockPool(3, 4)
    pool._blank.insert(0, pool.allocate())
    with pytest.raises(IntegrityError, match="lost track"):
        pool.check()


def test_check_notices_a_negative_count() -> None:
    pool = BlockPool(3, 4)
    pool._references[1] = -1
    with pytest.raises(IntegrityError, match="lost track"):
        pool.check()


def test_check_notices_a_kept_block_among_the_blank() -> None:
    pool = BlockPool(3, 4)
    pool._kept.add(1)
    with pytest.raises(IntegrityError, match="lost track"):
        pool.check()
