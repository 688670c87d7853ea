"""BlockTables: which blocks of every cache group each running sequence holds, and what it shares with others.

A block is published when the step that fills it has been scheduled: ranks run steps in order, so every later step may
read it. Window groups give back the blocks no later token can see; their table entries become -1 here and are never
read again on the ranks.
"""

from collections.abc import Iterable

from shoal.engine.block_pool import BlockPool
from shoal.engine.executor import Capacity
from shoal.engine.prefix_cache import extend_keys, first_visible_block, longest_hit, root_key
from shoal.engine.sequence import Sequence


class BlockTables:
    """The pools of all cache groups and the moves of sequences in them.

    Never fails half way: `room` says what `append` will grant. A sequence's tables have one length in all groups.
    """

    def __init__(self, capacity: Capacity, *, enable_prefix_caching: bool) -> None:
        self.block_size = capacity.block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.groups = capacity.groups
        self.windows = [group.window for group in capacity.groups]
        self.pools = [BlockPool(group.num_blocks) for group in capacity.groups]
        self.windowed = [group for group, window in enumerate(self.windows) if window is not None]
        self.no_blocks: list[list[int]] = [[] for _ in self.pools]
        self._being_computed: dict[bytes, Sequence] = {}

    def find_hit(self, seq: Sequence) -> int:
        """Leading blocks of a waiting sequence that need not be computed."""
        if not self.enable_prefix_caching:
            return 0
        full = len(seq.tokens) // self.block_size
        extend_keys(seq.keys, root_key(seq.request.cache_salt), seq.tokens, self.block_size, full)
        limit = seq.max_hit_tokens // self.block_size
        hit = longest_hit(seq.keys[:limit], self.pools, self.windows, self.block_size)
        seq.wanted_key = seq.keys[hit] if hit < limit else None
        return hit

    def is_coming(self, seq: Sequence) -> bool:
        """Whether a sequence that goes before this one computes what follows its hit: waiting saves doing it twice."""
        owner = self._being_computed.get(seq.wanted_key) if seq.wanted_key else None
        return owner is not None and owner.order < seq.order

    def newly_referenced(self, seq: Sequence, hit: int, group: int) -> int:
        """How many of the hit's blocks nobody references so far."""
        pool, first = self.pools[group], self._first_visible(hit * self.block_size, group)
        return sum(not pool.is_referenced(self._published(pool, key)) for key in seq.keys[first:hit])

    def attach(self, seq: Sequence, hit: int) -> None:
        """Give a waiting sequence the `hit` leading blocks that `find_hit` found just now."""
        seq.forget_cache(len(self.pools))
        for group, pool in enumerate(self.pools):
            first = self._first_visible(hit * self.block_size, group)
            blocks = [self._published(pool, key) for key in seq.keys[first:hit]]
            for block in blocks:
                pool.acquire(block)
            seq.tables[group] = [-1] * first + blocks
            seq.first_live[group] = first
        seq.last_blocks = [table[-1] if table else -1 for table in seq.tables]
        seq.num_computed = hit * self.block_size
        seq.num_hit_blocks = seq.num_published = hit
        for key in seq.keys[hit:]:
            self._being_computed.setdefault(key, seq)

    def room(self, seq: Sequence, num_tokens: int) -> int:
        """How many of the sequence's next `num_tokens` the available blocks suffice for."""
        held = len(seq.tables[0]) * self.block_size - seq.num_computed
        if held >= num_tokens:
            return num_tokens
        return min(num_tokens, held + min(pool.num_available for pool in self.pools) * self.block_size)

    def append(self, seq: Sequence, num_tokens: int) -> list[list[int]]:
        """Extend the tables for the next `num_tokens`, at most `room`.

        Returns the new blocks per group; do not change them.
        """
        missing = -(-(seq.num_computed + num_tokens) // self.block_size) - len(seq.tables[0])
        if missing <= 0:
            return self.no_blocks
        granted = [pool.allocate(missing) for pool in self.pools]
        for table, blocks in zip(seq.tables, granted, strict=True):
            table += blocks
        seq.last_blocks = [blocks[-1] for blocks in granted]
        return granted

    def settle(self, seq: Sequence) -> None:
        """Once its row is scheduled: later steps may find what it fills, as far as its tokens are known, and take what
        later tokens do not see.
        """
        if self.enable_prefix_caching and seq.num_published < seq.num_known // self.block_size:
            self._publish(seq)
        for group in self.windowed:
            self._drop_unseen(seq, group)

    def _publish(self, seq: Sequence) -> None:
        full = seq.num_known // self.block_size
        if len(seq.keys) < full:
            extend_keys(seq.keys, root_key(seq.request.cache_salt), seq.tokens, self.block_size, full)
        for index in range(seq.num_published, full):
            key = seq.keys[index]
            for pool, table, first in zip(self.pools, seq.tables, seq.first_live, strict=True):
                if index >= first:
                    pool.publish(table[index], key)
            self._no_longer_coming(key, seq)
        seq.num_published = full

    def release(self, seq: Sequence, *, trusted: bool = True) -> None:
        """Take all blocks of a sequence back. They stay cached unless its content is not to be trusted: then nobody
        finds it any more, what fell out of a window included.
        """
        for pool, table, first in zip(self.pools, seq.tables, seq.first_live, strict=True):
            if not trusted:
                for published in seq.keys[: seq.num_published]:
                    pool.forget(published)
            for index in reversed(range(first, len(table))):
                key = seq.keys[index] if trusted and index < seq.num_published else None
                pool.release(table[index], key)
        for key in seq.keys[seq.num_published :]:
            self._no_longer_coming(key, seq)
        seq.forget_cache(num_groups=0)

    def _first_visible(self, position: int, group: int) -> int:
        return first_visible_block(position, self.windows[group], self.block_size)

    def _drop_unseen(self, seq: Sequence, group: int) -> None:
        first, table = self._first_visible(seq.num_computed, group), seq.tables[group]
        for index in reversed(range(seq.first_live[group], first)):
            self.pools[group].release(table[index], seq.keys[index] if index < seq.num_published else None)
            table[index] = -1
        seq.first_live[group] = max(first, seq.first_live[group])

    def _no_longer_coming(self, key: bytes, seq: Sequence) -> None:
        if self._being_computed.get(key) is seq:
            del self._being_computed[key]

    @staticmethod
    def _published(pool: BlockPool, key: bytes) -> int:
        block = pool.lookup(key)
        assert block is not None, "a block of the hit is gone"
        return block

    def check_integrity(self, running: Iterable[Sequence]) -> None:
        """Assert that pools and tables agree, and that sequences hold what they will read."""
        running = list(running)
        for group, pool in enumerate(self.pools):
            pool.check_integrity(seq.tables[group][seq.first_live[group] :] for seq in running)
            for seq in running:
                table, first = seq.tables[group], seq.first_live[group]
                assert all(block == -1 for block in table[:first]), "an entry that fell out is still there"
                assert all(block >= 0 for block in table[first:]), "a hole in a table"
                assert first == self._first_visible(seq.num_computed, group), "a wrong part of a window is held"
                assert len(table) == len(seq.tables[0]) >= seq.num_computed / self.block_size, "a table is too short"
        assert all(seq in running for seq in self._being_computed.values()), (
            "content is promised by no running sequence"
        )
