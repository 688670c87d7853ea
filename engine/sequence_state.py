"""SequenceState: one running sequence as a rank remembers it."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from shoal.configs.sampling import SamplingParams

if TYPE_CHECKING:
    from shoal.engine.sampler import TokenCounts


@dataclass(slots=True)
class SequenceState:
    """One running sequence on a rank. token_ids: prompt, then output as far as known here. tables: per cache group, its
    block ids; last_blocks: the last one of each, -1 for none. plain: whether it chooses from the logits as they are and
    wants to know the token alone, min_tokens apart; found out when first asked for (engine/choosing.py).
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    sampling: SamplingParams
    seed: int
    sample_index: int
    eos_token_ids: list[int]
    bad_words_token_ids: list[list[int]]
    tables: list[np.ndarray]
    num_blocks: list[int]
    num_computed_tokens: int = 0
    counts: "TokenCounts | None" = field(default=None, repr=False)
    plain: bool | None = None
    last_blocks: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.last_blocks = [
            int(table[used - 1]) if used else -1 for table, used in zip(self.tables, self.num_blocks, strict=True)
        ]

    @property
    def num_output_tokens(self) -> int:
        """Output tokens known here."""
        return len(self.token_ids) - self.num_prompt_tokens

    def append_blocks(self, group: int, block_ids: list[int]) -> None:
        """Extend the block table of a cache group; its capacity doubles."""
        used, table = self.num_blocks[group], self.tables[group]
        if used + len(block_ids) > len(table):
            grown = np.full(max(2 * len(table), used + len(block_ids)), -1, np.int32)
            grown[:used] = table[:used]
            self.tables[group] = table = grown
        table[used : used + len(block_ids)] = block_ids
        self.num_blocks[group], self.last_blocks[group] = used + len(block_ids), block_ids[-1]
