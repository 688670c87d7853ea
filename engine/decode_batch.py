"""DecodeBatch: the tensors of steps of one token per row, kept from step to step: most of them change little."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from shoal.engine.messages import PlanRow
from shoal.engine.sequence_state import SequenceState
from shoal.model.batch import BatchInput, GroupTables

ALIGNMENT = 256  # bytes, of an array's first element
Layout = Mapping[str, tuple[type[np.generic], tuple[int, ...]]]  # type and shape of arrays by name


class StepMemory(NamedTuple):
    """Arrays written on the host, in one piece of memory, and the tensors they are on the device, in another; on a CPU
    the two are one. Host memory of a GPU is pinned. starts: their first bytes, and the end.
    """

    host: torch.Tensor
    device: torch.Tensor
    starts: list[int]
    arrays: Mapping[str, np.ndarray]
    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def zeros(cls, layout: Layout, device: torch.device) -> "StepMemory":
        """Of this layout."""
        sizes = [np.dtype(kind).itemsize * int(np.prod(shape)) for kind, shape in layout.values()]
        starts = np.cumsum([0, *(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)])
        host = torch.zeros(int(starts[-1]), dtype=torch.uint8, pin_memory=device.type == "cuda")
        held = host if device.type == "cpu" else host.to(device)
        arrays, tensors = {}, {}
        for (name, (kind, shape)), start, size in zip(layout.items(), starts.tolist(), sizes):
            arrays[name] = host[start : start + size].numpy().view(kind).reshape(shape)
            tensors[name] = held[start : start + size].view(getattr(torch, np.dtype(kind).name)).view(shape)
        return cls(host, held, starts.tolist(), arrays, tensors)


class Ragged(NamedTuple):
    """The tokens of rows of any lengths, row after row. starts: the rows' first positions; bounds: [rows + 1], their
    first tokens; rows, positions: of every token.
    """

    starts: np.ndarray
    counts: np.ndarray
    bounds: np.ndarray
    rows: np.ndarray
    positions: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[PlanRow]) -> "Ragged":
        """Those of a plan."""
        counts = np.array([row.num_tokens for row in rows], np.int64)
        starts = np.array([row.num_computed_tokens for row in rows], np.int64)
        bounds = np.zeros(len(counts) + 1, np.int64)
        np.cumsum(counts, out=bounds[1:])
        row_of_token = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(len(row_of_token)) + (starts - bounds[:-1])[row_of_token]
        return cls(starts, counts, bounds, row_of_token, positions)

    def slots(self, table_RB: np.ndarray, block_size: int) -> np.ndarray:
        """Where every token's key and value go: [tokens] int64."""
        blocks = table_RB[self.rows, self.positions // block_size].astype(np.int64)
        return blocks * block_size + self.positions % block_size


def take_tokens(rows: Sequence[PlanRow], sequences: Sequence[SequenceState]) -> list[int]:
    """The ids of the rows' tokens, which count as computed from here on."""
    tokens: list[int] = []
    for row, sequence in zip(rows, sequences, strict=True):
        stop = sequence.num_computed_tokens = row.num_computed_tokens + row.num_tokens
        tokens += sequence.token_ids[row.num_computed_tokens : stop]
    return tokens


class DecodeBatch:
    """For steps of so many rows, after which nobody looks at their tensors. widths: of the block tables, by cache
    group; tokens: of all rows, default: one each; more: other arrays in the same memory.
    """

    def __init__(
        self,
        count: int,
        widths: Sequence[int],
        block_size: int,
        device: torch.device,
        tokens: int | None = None,
        more: Layout | None = None,
    ) -> None:
        self.block_size, self.widths, groups = block_size, widths, range(len(widths))
        names, tokens = ("token_ids", "positions", *(f"slots {group}" for group in groups)), tokens or count
        self.memory = StepMemory.zeros(
            {
                **dict.fromkeys(names, (np.int64, (tokens,))),
                "seq_lens": (np.int32, (count,)),
                "bounds": (np.int32, (count + 1,)),
                **(more or {}),
                **{f"table {group}": (np.int32, (count, width)) for group, width in enumerate(widths)},
            },
            device,
        )
        arrays, tensors = self.memory.arrays, self.memory.tensors
        arrays["bounds"][:] = np.arange(count + 1)
        self.held: list[tuple[SequenceState, list[int]] | None] = [None] * count  # whose blocks a row has, how many
        self.tables = [arrays[f"table {group}"] for group in groups]
        self.slots = [arrays[f"slots {group}"].data for group in groups]
        # views of memory are quicker to write single numbers to
        self.token_ids, self.positions, self.seq_lens = (
            arrays[name].data for name in ("token_ids", "positions", "seq_lens")
        )
        for table in self.tables:
            table.fill(-1)
        self.tables_changed = True
        self.batch = BatchInput(
            token_ids_T=tensors["token_ids"],
            positions_T=tensors["positions"],
            cu_seqlens_q=tensors["bounds"],
            seq_lens=tensors["seq_lens"],
            max_seqlen_q=1,
            max_seqlen_k=0,
            groups=tuple(GroupTables(tensors[f"table {group}"], tensors[f"slots {group}"]) for group in groups),
        )

    def fill(self, rows: Sequence[PlanRow], sequences: Sequence[SequenceState]) -> BatchInput | None:
        """The batch of these rows, one token each; marks their tokens as computed. None when they do not fit. Valid
        until the next call.
        """
        if len(rows) != len(self.held) or not self.begin(sequences):
            return None
        self.batch.max_seqlen_k = self.write(rows, sequences)
        return self.batch

    def begin(self, sequences: Sequence[SequenceState]) -> bool:
        """Make the first rows these sequences'; False when there is no room."""
        for index, (sequence, held) in enumerate(zip(sequences, self.held)):
            same = held is not None and held[0] is sequence and held[1] == sequence.num_blocks
            if not same and not self.hold(index, sequence):
                return False
        return len(sequences) <= len(self.held)

    def write(self, rows: Sequence[PlanRow], sequences: Sequence[SequenceState]) -> int:
        """What changes with every step, of the first rows, whose tokens count as computed from here on. Returns the
        longest row's length.
        """
        longest, size = 0, self.block_size
        token_ids, positions, seq_lens, slots = self.token_ids, self.positions, self.seq_lens, self.slots
        for index, (row, sequence) in enumerate(zip(rows, sequences, strict=True)):
            position = row.num_computed_tokens
            length = sequence.num_computed_tokens = position + 1
            token_ids[index], positions[index], seq_lens[index] = sequence.token_ids[position], position, length
            block, offset = position // size, position % size
            for group, table in enumerate(sequence.tables):
                slots[group][index] = table.item(block) * size + offset
            if length > longest:
                longest = length
        return longest

    def hold(self, index: int, sequence: SequenceState) -> bool:
        """Have a row's block tables be the sequence's; False when they have no room for it."""
        num_blocks = sequence.num_blocks
        if any(used > width for used, width in zip(num_blocks, self.widths, strict=True)):
            return False
        for table, blocks, used in zip(self.tables, sequence.tables, num_blocks, strict=True):
            table[index, :used] = blocks[:used]
        self.tables_changed = True
        self.held[index] = sequence, [*num_blocks]
        return True
