"""Which full KV blocks hold which tokens: a tree whose path from the root spells a prefix, block by block.

Blocks are known by value. A child hangs in its parent's dict under the tuple of its tokens, and a dict
compares whole keys: two prefixes whose hashes collide stay two prefixes. A cache that trusted a hash alone
would one day serve another prompt's bits.

When a block is handed out anew, its node leaves the tree *with everything below it*: below a missing parent
nothing can be reached, and what cannot be reached must not look cached. Sequences give their blocks back last
position first, so the least recently used block is nearly always a leaf. The exception is a sequence that
computed a private duplicate of a cached block: its further blocks hang below a block that it does not hold.
A node is dropped once for each time it was inserted, so dropping takes constant time per insertion.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from isobatch.engine.block_pool import BlockPool
from isobatch.errors import IntegrityError


@dataclass(slots=True, eq=False)
class Node:
    """A cached block, or the root.

    Attributes:
        parent: the node of the prefix before this block; None for the root.
        tokens: the block's own token ids, `block_size` of them; none for the root.
        block: where their keys and values are; -1 for the root.
        children: the blocks known to follow.
        live: False once it has left the tree.
    """

    parent: Node | None
    tokens: tuple[int, ...]
    block: int
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    live: bool = True


class PrefixCache:
    """Finds the blocks that already hold a prefix. Full blocks only, compared token by token.

    Args:
        pool: the blocks; the cache asks it to keep what is inserted, and hears when one is handed out anew.

    Determinism: a hit saves the computing of keys and values that would come out the same, bit for bit.
    """

    def __init__(self, pool: BlockPool) -> None:
        self.root = Node(None, (), -1)
        self._pool = pool
        self._nodes: dict[int, Node] = {}
        pool.on_evict = self.forget

    def __len__(self) -> int:
        return len(self._nodes)

    def match(self, tokens: tuple[int, ...]) -> tuple[list[int], Node]:
        """Find the longest known prefix in whole blocks.

        Args:
            tokens: token ids from position 0 on.

        Returns:
            Its blocks in order of position, without a reference taken, and the node it ends at.
        """
        size = self._pool.block_size
        blocks: list[int] = []
        node = self.root
        for start in range(0, len(tokens), size):  # a partial last block equals none, for all known are full
            child = node.children.get(tokens[start : start + size])
            if child is None:
                break
            node = child
            blocks.append(node.block)
        return blocks, node

    def insert(self, parent: Node, tokens: tuple[int, ...], block: int) -> Node:
        """Make a full and computed block known.

        If another block already holds the same prefix, that one stays and this one remains its holder's
        private duplicate. If the parent has left the tree, nothing is inserted: it could not be found there.

        Args:
            parent: the node of the prefix before this block.
            tokens: the block's own token ids, `block_size` of them.
            block: the block, held by the caller.

        Returns:
            The node to hand in as the next block's parent.

        Raises:
            IntegrityError: the block is not full, or is known already as something else.
        """
        if not parent.live:
            return parent
        known = parent.children.get(tokens)
        if known is not None:
            return known
        if len(tokens) != self._pool.block_size or block in self._nodes:
            raise IntegrityError(
                f"block {block} cannot be cached",
                expected=f"an unknown block of {self._pool.block_size} tokens",
                got=f"{len(tokens)} tokens, {'known' if block in self._nodes else 'unknown'}",
            )
        node = Node(parent, tokens, block)
        parent.children[tokens] = self._nodes[block] = node
        self._pool.keep(block)
        return node

    def forget(self, block: int) -> None:
        """Drop a block and every block below it from the tree; holders keep theirs, as private blocks.

        Args:
            block: any block; one that is not cached is left alone.
        """
        node = self._nodes.get(block)
        if node is None or node.parent is None:
            return
        del node.parent.children[node.tokens]
        dropped = [node]
        while dropped:
            node = dropped.pop()
            dropped.extend(node.children.values())
            node.children.clear()  # no cycle for the garbage collector to chase
            node.live = False
            del self._nodes[node.block]
            self._pool.unkeep(node.block)

    def check(self) -> None:
        """Verify that the tree, the index by block and the pool agree.

        Raises:
            IntegrityError: they do not.
        """
        reached: dict[int, Node] = {}
        stack = [self.root]
        while stack:
            node = stack.pop()
            for tokens, child in node.children.items():
                if child.parent is not node or child.tokens != tokens or not child.live:
                    raise IntegrityError(f"the prefix tree is torn at block {child.block}")
                reached[child.block] = child
                stack.append(child)
        if reached != self._nodes:
            raise IntegrityError(
                "the prefix cache lost track", expected=sorted(self._nodes), got=sorted(reached)
            )
        if self._pool.num_kept != len(reached) or not all(map(self._pool.is_kept, reached)):
            raise IntegrityError("the block pool keeps other blocks than the prefix cache knows")
