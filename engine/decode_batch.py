"""DecodeBatch: the tensors of steps of one token per row, kept from step to step: most of them change little."""

from collections.abc import Sequence

import numpy as np
import torch

from shoal.engine.messages import PlanRow
from shoal.engine.sequence_state import SequenceState
from shoal.model.batch import BatchInput, GroupTables

LEAST_WIDTH = 16  # of a block table


class DecodeBatch:
    """For steps of so many rows on a CPU, where nobody looks at a step's tensors after it."""

    def __init__(self, sequences: Sequence[SequenceState], block_size: int) -> None:
        """sequences: some to make room for, with as much again for their growth."""
        count, self.block_size = len(sequences), block_size
        most = (max(used) for used in zip(*(sequence.num_blocks for sequence in sequences), strict=True))
        self.widths = [max(LEAST_WIDTH, 2 * used) for used in most]  # by cache group
        token_ids, positions, seq_lens = np.zeros(count, np.int64), np.zeros(count, np.int64), np.zeros(count, np.int32)
        slots = [np.zeros(count, np.int64) for _ in self.widths]
        self.tables = [np.full((count, width), -1, np.int32) for width in self.widths]
        self.held: list[tuple[SequenceState, list[int]] | None] = [None] * count  # whose blocks a row has, how many
        self.token_ids, self.positions, self.seq_lens = token_ids.data, positions.data, seq_lens.data
        self.slots = [array.data for array in slots]  # views of memory are quicker to write single numbers to
        self.batch = BatchInput(
            token_ids_T=torch.from_numpy(token_ids),
            positions_T=torch.from_numpy(positions),
            cu_seqlens_q=torch.from_numpy(np.arange(count + 1, dtype=np.int32)),
            seq_lens=torch.from_numpy(seq_lens),
            max_seqlen_q=1,
            max_seqlen_k=0,
            groups=tuple(
                GroupTables(torch.from_numpy(table), torch.from_numpy(array))
                for table, array in zip(self.tables, slots, strict=True)
            ),
        )

    def fill(self, rows: Sequence[PlanRow], sequences: Sequence[SequenceState]) -> BatchInput | None:
        """The batch of these rows, one token each; marks their tokens as computed. None when they do not fit. Valid
        until the next call.
        """
        if len(rows) != len(self.held):
            return None
        longest, size = 0, self.block_size
        for index, (row, sequence) in enumerate(zip(rows, sequences, strict=True)):
            if not self.hold(index, sequence):
                return None
            position = row.num_computed_tokens
            length = sequence.num_computed_tokens = position + 1
            self.token_ids[index] = sequence.token_ids[position]
            self.positions[index], self.seq_lens[index] = position, length
            block, offset = divmod(position, size)
            for slots, table in zip(self.slots, sequence.tables, strict=True):
                slots[index] = int(table[block]) * size + offset
            longest = max(longest, length)
        self.batch.max_seqlen_k = longest
        return self.batch

    def hold(self, index: int, sequence: SequenceState) -> bool:
        """Have a row's block tables be the sequence's; False when they have no room for it."""
        held, num_blocks = self.held[index], sequence.num_blocks
        if held is not None and held[0] is sequence and held[1] == num_blocks:
            return True
        if any(used > width for used, width in zip(num_blocks, self.widths, strict=True)):
            return False
        for table, blocks, used in zip(self.tables, sequence.tables, num_blocks, strict=True):
            table[index, :used] = blocks[:used]
        self.held[index] = sequence, [*num_blocks]
        return True
