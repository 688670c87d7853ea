"""BlockPool: the blocks of one cache group, each of them free, cached or referenced.

A block is referenced while a running sequence has it in its table. A full block whose content is known by a key is
published: new sequences find it by that key, and when nobody references it any more it is cached until its memory is
needed. The block released longest ago goes first. A sequence releases its blocks from the last to the first, so a block
is always older in that order than the blocks it builds on: eviction takes the leaves of the prefix tree without
counting children.

Keys stand for the content of the whole prefix (`prefix_cache`), so a block whose parents are gone is never wrong. It is
only out of reach until somebody computes them again.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable

from shoal.engine.cache_log import CacheLog


class BlockPool:
    """The blocks 0 .. num_blocks - 1 of one cache group. Every method takes constant time per block.

    log: told what becomes known by its content and what is forgotten, when somebody wants to know.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self._keys: list[bytes | None] = [None] * num_blocks
        self._published: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        self.log: CacheLog | None = None

    @property
    def num_free(self) -> int:
        """Blocks with no content anybody could use."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Published blocks that nobody references."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can give."""
        return len(self._free) + len(self._cached)

    @property
    def num_referenced(self) -> int:
        """Blocks in the table of at least one sequence."""
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def keys(self) -> Iterable[bytes]:
        """Of all published blocks."""
        return self._published.keys()

    def lookup(self, key: bytes) -> int | None:
        """The published block with this content, if there is one."""
        return self._published.get(key)

    def is_referenced(self, block: int) -> bool:
        """Whether a sequence holds the block."""
        return self._references[block] > 0

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks with one reference each, the free ones first, then the ones cached longest.

        At most num_available.
        """
        assert count <= self.num_available, f"{count} blocks wanted, {self.num_available} available"
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._unpublish(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def acquire(self, block: int) -> None:
        """Add a reference to a published block."""
        if not self._references[block]:
            del self._cached[block]
        self._references[block] += 1

    def publish(self, block: int, key: bytes) -> None:
        """Make a referenced block known by its content.

        Where another block has the same content already, that one counts as used now.
        """
        twin = self._published.setdefault(key, block)
        if twin == block:
            if self.log is not None and self._keys[block] is None:
                self.log.stored(key)
            self._keys[block] = key
        elif twin in self._cached:
            self._cached.move_to_end(twin)

    def release(self, block: int, key: bytes | None = None) -> None:
        """Take a reference back; `key` publishes the block's content if it was not.

        Release a sequence's last block first.
        """
        assert self._references[block] > 0, f"block {block} is not referenced"
        self._references[block] -= 1
        if key is not None and self._keys[block] is None:
            self.publish(block, key)
        if not self._references[block]:
            if self._keys[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def forget(self, key: bytes) -> None:
        """Withdraw published content, whoever holds it: nobody will find it any more. Unknown keys are no error."""
        block = self._published.get(key)
        if block is None:
            return
        self._unpublish(block)
        if block in self._cached:
            del self._cached[block]
            self._free.append(block)

    def _unpublish(self, block: int) -> None:
        key = self._keys[block]
        assert key is not None
        if self.log is not None:
            self.log.removed(key)
        del self._published[key]
        self._keys[block] = None

    def check_integrity(self, tables: Iterable[Iterable[int]]) -> None:
        """Assert every invariant of the pool.

        tables: the live blocks of every running sequence. Takes time in the size of the pool.
        """
        counts = Counter(block for table in tables for block in table)
        expected = [counts.get(block, 0) for block in range(self.num_blocks)]
        assert self._references == expected, "references differ from the tables"
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        referenced = {block for block, count in enumerate(self._references) if count}
        assert not free & cached and not free & referenced and not cached & referenced, "a block has two states"
        assert len(free) + len(cached) + len(referenced) == self.num_blocks, "a block has no state"
        named = {block: key for block, key in enumerate(self._keys) if key is not None}
        assert {key: block for block, key in named.items()} == self._published, "keys and published blocks differ"
        assert cached <= named.keys() and not free & named.keys(), "a cached block has no key, or a free one has"
