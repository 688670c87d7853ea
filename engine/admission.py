"""Admission: whether the running set with one more sequence will fit the cache at the peak of its use.

Sequences release their blocks when they end, so the peak is at the end of some sequence: with k others that still run,
each as long as it will be by then (the "past-future" estimate of arXiv 2507.10150). How long an output will be is
guessed from those that ended; max_tokens and max_model_len bound it. A wrong guess costs a preemption, never an error.
"""

from collections.abc import Iterable

from shoal.engine.block_tables import BlockTables
from shoal.engine.sequence import Sequence

FIRST_GUESS = 256  # output tokens, before any request has ended
WEIGHT = 0.05  # of a new observation in the mean output length


def check_fits_alone(tables: BlockTables, num_prompt_tokens: int, max_num_tokens: int) -> None:
    """Raise ValueError when a sequence of max_num_tokens could not run even with the whole cache to itself."""
    for group, pool in zip(tables.groups, tables.pools, strict=True):
        needed = _blocks(max_num_tokens - 1, group.window, tables.block_size)
        if needed > pool.num_blocks:
            raise ValueError(
                f"the request needs {needed} blocks of {tables.block_size} tokens in cache group {group.name!r} "
                f"(prompt {num_prompt_tokens} tokens, up to {max_num_tokens} with its output), "
                f"the cache has {pool.num_blocks}: raise cache.num_blocks to {needed}, "
                "or lower max_tokens or model.max_model_len"
            )


def _blocks(num_tokens: int, window: int | None, block_size: int) -> int:
    """Blocks a decoding sequence of this length holds at most, wherever the window's edge lies in a block."""
    whole = -(-num_tokens // block_size)
    return whole if window is None else min(whole, -(-(window - 1) // block_size) + 1)


class Admission:
    """Projects the peak use of every cache group. mean_output: output tokens of the requests that ended.

    most_blocks: of the sequences that entered and did not leave, each at its longest and alone in every group.
    """

    def __init__(self, tables: BlockTables) -> None:
        self._tables = tables
        self.mean_output = float(FIRST_GUESS)
        self.most_blocks = 0
        self._smallest = min(pool.num_blocks for pool in tables.pools)

    def enter(self, seq: Sequence) -> None:
        """Count a sequence that joins the running set."""
        self.most_blocks += self.most(seq)

    def leave(self, seq: Sequence) -> None:
        """Count one that leaves it no more."""
        self.most_blocks -= self.most(seq)

    def most(self, seq: Sequence) -> int:
        """Blocks of a sequence at its longest."""
        return -(-seq.max_num_tokens // self._tables.block_size)

    def observe(self, num_output_tokens: int) -> None:
        """Learn from a request that ended by itself."""
        self.mean_output += WEIGHT * (num_output_tokens - self.mean_output)

    def remaining(self, seq: Sequence) -> int:
        """Output tokens the sequence is expected to generate from now on: at least a block's worth, if it may."""
        guess = max(int(self.mean_output) - seq.num_output_tokens, self._tables.block_size)
        return min(guess, seq.max_num_tokens - len(seq.tokens))

    def fits(self, running: Iterable[Sequence], candidate: Sequence, hit: int) -> bool:
        """Whether the candidate, with its `hit` leading blocks from the cache, fits beside the running sequences, all
        of which have entered.
        """
        if self.most_blocks + self.most(candidate) <= self._smallest:
            return True  # whatever they become
        expected = [(self.remaining(seq), seq, seq.num_hit_blocks) for seq in running]
        expected.append((self.remaining(candidate), candidate, hit))
        expected.sort(key=lambda entry: -entry[0])
        for index, pool in enumerate(self._tables.pools):
            if self._tables.windows[index] is None:
                peak = self._shared(index, expected) + self._tables.newly_referenced(candidate, hit, index)
                peak += self._growing_peak(expected)
            else:
                peak = sum(self._window_need(left, seq, index) for left, seq, _ in expected)
            if peak > pool.num_blocks:
                return False
        return True

    def _shared(self, group: int, expected: list[tuple[int, Sequence, int]]) -> int:
        """Referenced blocks that running sequences found in the cache, each counted once."""
        own = sum(len(seq.tables[group]) - hit for _, seq, hit in expected if seq.tables)
        return max(0, self._tables.pools[group].num_referenced - own)

    def _growing_peak(self, expected: list[tuple[int, Sequence, int]]) -> int:
        """Most blocks the sequences hold of their own at one time; those expected to end last come first."""
        block_size, tokens, peak = self._tables.block_size, 0, 0
        for count, (left, seq, hit) in enumerate(expected, start=1):
            tokens += len(seq.tokens) - 1 - hit * block_size
            peak = max(peak, (tokens + count * (left + block_size - 1)) // block_size)
        return peak

    def _window_need(self, left: int, seq: Sequence, group: int) -> int:
        return _blocks(len(seq.tokens) - 1 + left, self._tables.windows[group], self._tables.block_size)
