"""The KV cache's blocks as numbers: how often each is held, which are free, which are free but remembered.

A block is in exactly one of three states::

    held    references > 0
    blank   free, and nobody cares what is in it
    idle    free, but the prefix cache still knows its content: reusable until somebody needs the room

Blank blocks are handed out first, then idle ones, the least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from isobatch.errors import ConfigError, IntegrityError


class BlockPool:
    """Reference counts and free lists over the blocks 0 to `num_blocks` - 1. All but `check` is O(1).

    Args:
        num_blocks: how many blocks there are.
        block_size: tokens per block.

    Attributes:
        on_evict: called with an idle block that is about to be handed out again; set by the prefix cache.

    Raises:
        ConfigError: either number is below 1.

    Determinism: which block a sequence is given is no input of any kernel's sum, only of its addresses.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ConfigError(
                "a block pool without room",
                expected="num_blocks and block_size of 1 or more",
                got=f"{num_blocks} blocks of {block_size} tokens",
                fix="give the KV cache more memory",
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.on_evict: Callable[[int], None] | None = None
        self._references = [0] * num_blocks
        self._blank = list(reversed(range(num_blocks)))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._kept: set[int] = set()

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can still hand out, idle ones included."""
        return len(self._blank) + len(self._idle)

    @property
    def num_kept(self) -> int:
        """Blocks whose content is remembered, held or idle."""
        return len(self._kept)

    def references(self, block: int) -> int:
        """Return how many holders the block has."""
        return self._references[block]

    def is_kept(self, block: int) -> bool:
        """Whether the block's content is remembered."""
        return block in self._kept

    def allocate(self) -> int:
        """Hand out a free block with one reference; its former content is forgotten.

        Returns:
            The block.

        Raises:
            IntegrityError: none is free. Callers look at `num_free` first.
        """
        if self._blank:
            block = self._blank.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            self._kept.discard(block)
            if self.on_evict is not None:
                self.on_evict(block)
        else:
            raise IntegrityError("no block is free", expected="a look at num_free before allocate()")
        self._references[block] = 1
        return block

    def incref(self, block: int) -> None:
        """Add a holder to a block that is held or idle.

        Raises:
            IntegrityError: the block is blank, so its content is nobody's.
        """
        if self._references[block] == 0:
            if block not in self._idle:
                raise IntegrityError(f"block {block} was shared", expected="held or idle", got="blank")
            del self._idle[block]
        self._references[block] += 1

    def decref(self, block: int) -> None:
        """Take a holder away; without any left the block is free, and idle if its content is kept.

        Raises:
            IntegrityError: the block has no holder: it is freed twice.
        """
        if self._references[block] == 0:
            raise IntegrityError(f"block {block} was freed twice", expected="1 holder or more", got=0)
        self._references[block] -= 1
        if self._references[block] == 0:
            if block in self._kept:
                self._idle[block] = None
            else:
                self._blank.append(block)

    def keep(self, block: int) -> None:
        """Remember the content of a held block, also once it is free.

        Raises:
            IntegrityError: nobody holds the block.
        """
        if self._references[block] == 0:
            raise IntegrityError(f"block {block} was kept", expected="a held block", got="a free one")
        self._kept.add(block)

    def unkeep(self, block: int) -> None:
        """Stop remembering a block's content; an idle one becomes blank."""
        self._kept.discard(block)
        if block in self._idle:
            del self._idle[block]
            self._blank.append(block)

    def check(self) -> None:
        """Verify that every block is in exactly one state.

        Raises:
            IntegrityError: it is not; the message names the blocks.
        """
        held = [block for block, count in enumerate(self._references) if count > 0]
        listed = sorted([*held, *self._blank, *self._idle])
        if listed != list(range(self.num_blocks)):
            raise IntegrityError(
                "the block pool lost track",
                expected=f"each of {self.num_blocks} blocks once among held, blank and idle",
                got=f"held {held}, blank {self._blank}, idle {list(self._idle)}",
            )
        free_and_kept = self._kept.difference(held)
        if min(self._references) < 0 or free_and_kept != set(self._idle):
            raise IntegrityError(
                "the block pool lost track",
                expected="counts of 0 or more, and idle blocks to be the kept ones among the free",
                got=f"counts {self._references}, kept {sorted(self._kept)}, idle {list(self._idle)}",
            )
