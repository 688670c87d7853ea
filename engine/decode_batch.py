"""DecodeBatch: the tensors of steps of one token per row, kept from step to step: most of them change little."""

from collections.abc import Sequence

import numpy as np
import torch

from shoal.engine.sequence_state import SequenceState
from shoal.model.batch import BatchInput, GroupTables

LEAST_WIDTH = 16  # of a block table


class DecodeBatch:
    """For steps of so many rows on a CPU, where nobody looks at a step's tensors after it."""

    def __init__(self, sequences: Sequence[SequenceState], block_size: int) -> None:
        """sequences: some to make room for, with as much again for their growth."""
        count, self.block_size = len(sequences), block_size
        self.widths = [max(LEAST_WIDTH, 2 * used) for used in most_blocks(sequences)]
        self.token_ids, self.positions = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self.seq_lens = np.zeros(count, np.int32)
        self.tables = [np.full((count, width), -1, np.int32) for width in self.widths]
        self.slots = [np.zeros(count, np.int64) for _ in self.widths]
        self.held: list[tuple[SequenceState, list[int]] | None] = [None] * count  # whose blocks a row has, how many
        self.batch = BatchInput(
            token_ids_T=torch.from_numpy(self.token_ids),
            positions_T=torch.from_numpy(self.positions),
            cu_seqlens_q=torch.arange(count + 1, dtype=torch.int32),
            seq_lens=torch.from_numpy(self.seq_lens),
            max_seqlen_q=1,
            max_seqlen_k=0,
            groups=tuple(
                GroupTables(torch.from_numpy(table), torch.from_numpy(slots))
                for table, slots in zip(self.tables, self.slots, strict=True)
            ),
        )

    def fits(self, sequences: Sequence[SequenceState]) -> bool:
        """Whether these sequences can be its rows."""
        return len(sequences) == len(self.held) and all(
            used <= width for used, width in zip(most_blocks(sequences), self.widths, strict=True)
        )

    def fill(self, sequences: Sequence[SequenceState], positions: Sequence[int]) -> BatchInput:
        """The batch of one token of each, at these positions. Valid until the next call."""
        for row, sequence in enumerate(sequences):
            held = self.held[row]
            if held is None or held[0] is not sequence or held[1] != sequence.num_blocks:
                for table, blocks, used in zip(self.tables, sequence.tables, sequence.num_blocks, strict=True):
                    table[row, :used] = blocks[:used]
                self.held[row] = sequence, [*sequence.num_blocks]
        self.token_ids[:] = [one.token_ids[position] for one, position in zip(sequences, positions, strict=True)]
        self.positions[:] = positions
        self.seq_lens[:] = [position + 1 for position in positions]
        size = self.block_size
        for group, slots in enumerate(self.slots):
            slots[:] = [
                int(one.tables[group][position // size]) * size + position % size
                for one, position in zip(sequences, positions, strict=True)
            ]
        self.batch.max_seqlen_k = max(positions) + 1
        return self.batch


def most_blocks(sequences: Sequence[SequenceState]) -> list[int]:
    """Per cache group, the most blocks that one of them has."""
    return [max(used) for used in zip(*(sequence.num_blocks for sequence in sequences), strict=True)]
