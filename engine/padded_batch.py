"""PaddedBatch: the tensors of a GPU's steps of about so many rows and tokens. They keep their place, so that a step on
them can be a CUDA graph (model/graph_steps.py), and come to the device in one copy, block tables only when one changed.

There are few sizes, so that there are few graphs. In a step of one token per row the rows beyond its own repeat its
shortest one and write nothing to the cache: what they compute is finite, routes to experts that are read already, and
is not looked at. In others (MixedBatch) the tokens beyond its own belong to no row.
"""

from collections.abc import Sequence

import numpy as np
import torch

from shoal.engine.choosing import filters
from shoal.engine.decode_batch import DecodeBatch, Layout, Ragged, take_tokens
from shoal.engine.messages import PlanRow
from shoal.engine.sequence_state import SequenceState
from shoal.model.batch import BatchInput, RowSettings

FLOATS, INTEGERS = ("temperature", "top_p", "min_p"), ("top_k", "seeds", "drawn", "sample_indices", "ends")  # settings
NOWHERE = -1  # a slot


class PaddedBatch(DecodeBatch):
    """rows, tokens: at least a step's; width: of all block tables."""

    def __init__(
        self, rows: int, tokens: int, width: int, num_groups: int, block_size: int, device: torch.device
    ) -> None:
        layout: Layout = {name: (np.float32 if name in FLOATS else np.int64, (rows,)) for name in (*FLOATS, *INTEGERS)}
        super().__init__(rows, [width] * num_groups, block_size, device, tokens, layout)
        self.settings = {name: self.memory.arrays[name] for name in layout}
        self.filtering, self.prompts = [False] * rows, np.zeros(rows, np.int64)
        self.padded_with = (rows, 0)  # the first row that is not a step's, and whose table it has
        self.copied = torch.cuda.Event() if device.type == "cuda" else None
        temperature, top_p, min_p, top_k, seeds, drawn, sample_indices, ends = (
            self.memory.tensors[name] for name in layout
        )
        self.batch.settings = RowSettings(temperature, top_p, min_p, top_k, seeds, drawn, sample_indices)
        self.batch.max_seqlen_k = width * block_size
        if tokens > rows:
            self.batch.settings.ends, self.batch.max_seqlen_q = ends, tokens

    def hold(self, index: int, sequence: SequenceState) -> bool:
        """The sequence's settings as well."""
        held, params = self.held[index], sequence.sampling
        if held is None or held[0] is not sequence:
            mine = (params.temperature, params.top_p, params.min_p, params.top_k, sequence.seed)
            for name, value in zip((*FLOATS, *INTEGERS), mine, strict=False):
                self.settings[name][index] = value
            self.settings["sample_indices"][index] = sequence.sample_index
            self.filtering[index], self.prompts[index] = filters(params), sequence.num_prompt_tokens
        return super().hold(index, sequence)

    def begin(self, sequences: Sequence[SequenceState]) -> bool:
        """Make the first rows these sequences', once the step before has been copied; False when there is no room."""
        if self.copied is not None:
            self.copied.synchronize()
        return super().begin(sequences)

    def fill(self, rows: Sequence[PlanRow], sequences: Sequence[SequenceState]) -> BatchInput:
        """As DecodeBatch's, of at most as many rows, after `begin`."""
        count, arrays, settings = len(rows), self.memory.arrays, self.batch.settings
        assert settings is not None, "it was made with them"
        self.write(rows, sequences)
        arrays["drawn"][:count] = arrays["seq_lens"][:count] - self.prompts[:count]
        settings.filters = any(self.filtering[:count])
        arrays["temperature"][count:] = 0.0
        self.held[count:] = [None] * (len(self.held) - count)
        if self.copied is not None:
            end = self.memory.starts[-1 if self.tables_changed else -1 - len(self.tables)]  # tables are the last
            self.memory.device[:end].copy_(self.memory.host[:end], non_blocking=True)
            self.copied.record()
        self.tables_changed = False
        return self.batch

    def write(self, rows: Sequence[PlanRow], sequences: Sequence[SequenceState]) -> int:
        """As DecodeBatch's, many rows at once, and the rows beyond a step's as well."""
        count, arrays, size = len(rows), self.memory.arrays, self.block_size
        positions = np.array([row.num_computed_tokens for row in rows])
        arrays["token_ids"][:count] = [
            sequence.token_ids[row.num_computed_tokens] for row, sequence in zip(rows, sequences, strict=True)
        ]
        arrays["positions"][:count], arrays["seq_lens"][:count] = positions, positions + 1
        for row, sequence in zip(rows, sequences, strict=True):
            sequence.num_computed_tokens = row.num_computed_tokens + 1
        for group, table in enumerate(self.tables):
            blocks = table[np.arange(count), positions // size].astype(np.int64)
            arrays[f"slots {group}"][:count] = blocks * size + positions % size
        if count < len(self.held):
            self.pad(count, int(positions.argmin()))
        else:
            self.padded_with = (count, 0)
        return int(positions.max()) + 1

    def pad(self, count: int, shortest: int) -> None:
        """Make the rows from `count` on the shortest one's, all of whose blocks lie within the cache."""
        arrays = self.memory.arrays
        for name in ("token_ids", "positions", "seq_lens"):
            arrays[name][count:] = arrays[name][shortest]
        for group in range(len(self.tables)):
            arrays[f"slots {group}"][count:] = NOWHERE
        if self.tables_changed or self.padded_with != (count, shortest):
            self.padded_with, self.tables_changed = (count, shortest), True
            for table in self.tables:
                table[count:] = table[shortest]


class MixedBatch(PaddedBatch):
    """Rows of any number of tokens."""

    def write(self, rows: Sequence[PlanRow], sequences: Sequence[SequenceState]) -> int:
        """See DecodeBatch."""
        count, arrays, ragged = len(rows), self.memory.arrays, Ragged.of(rows)
        total, lengths = int(ragged.bounds[count]), ragged.starts + ragged.counts
        arrays["bounds"][: count + 1], arrays["bounds"][count + 1 :] = ragged.bounds, total
        arrays["token_ids"][:total], arrays["token_ids"][total:] = take_tokens(rows, sequences), 0
        arrays["positions"][:total], arrays["positions"][total:] = ragged.positions, 0
        arrays["seq_lens"][:count], arrays["seq_lens"][count:] = lengths, 0
        arrays["ends"][:count], arrays["ends"][count:] = ragged.bounds[1:] - 1, 0
        for group, table in enumerate(self.tables):
            slots = arrays[f"slots {group}"]
            slots[:total], slots[total:] = ragged.slots(table, self.block_size), NOWHERE
        return int(lengths.max())
