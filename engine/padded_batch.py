"""PaddedBatch: a DecodeBatch of a GPU. Its tensors keep their place, so that a step on them can be a CUDA graph
(model/graph_steps.py), and come to the device in one copy.

There are few sizes, so that there are few graphs. Rows beyond a step's repeat its shortest one and write nothing to the
cache: what they compute is finite, routes to experts that are read already, and is not looked at.
"""

from collections.abc import Sequence

import numpy as np
import torch

from shoal.engine.choosing import filters
from shoal.engine.decode_batch import DecodeBatch, Layout
from shoal.engine.messages import PlanRow
from shoal.engine.sequence_state import SequenceState
from shoal.model.batch import BatchInput, RowSettings

FLOATS, INTEGERS = ("temperature", "top_p", "min_p"), ("top_k", "seeds", "drawn", "sample_indices")  # RowSettings
NOWHERE = -1  # a slot


class PaddedBatch(DecodeBatch):
    """count: rows, at least a step's; width: of all block tables."""

    def __init__(self, count: int, width: int, num_groups: int, block_size: int, device: torch.device) -> None:
        settings: Layout = {
            name: (np.float32 if name in FLOATS else np.int64, (count,)) for name in (*FLOATS, *INTEGERS)
        }
        super().__init__(count, [width] * num_groups, block_size, device, settings)
        self.settings = {name: self.memory.arrays[name] for name in settings}
        self.drawn = self.settings["drawn"].data
        self.batch.max_seqlen_k = width * block_size
        temperature, top_p, min_p, top_k, seeds, drawn, sample_indices = (
            self.memory.tensors[name] for name in settings
        )
        self.batch.settings = RowSettings(temperature, top_p, min_p, top_k, seeds, drawn, sample_indices)
        self.filtering = [False] * count
        self.copied = torch.cuda.Event() if device.type == "cuda" else None

    def hold(self, index: int, sequence: SequenceState) -> bool:
        """The sequence's settings as well."""
        held, params = self.held[index], sequence.sampling
        if held is None or held[0] is not sequence:
            mine = (
                params.temperature,
                params.top_p,
                params.min_p,
                params.top_k,
                sequence.seed,
                0,
                sequence.sample_index,
            )
            for name, value in zip((*FLOATS, *INTEGERS), mine, strict=True):
                self.settings[name][index] = value
            self.filtering[index] = filters(params)
        return super().hold(index, sequence)

    def begin(self, sequences: Sequence[SequenceState]) -> bool:
        """Make the first rows these sequences', once the step before has been copied; False when there is no room."""
        if self.copied is not None:
            self.copied.synchronize()
        return len(sequences) <= len(self.held) and all(map(self.hold, range(len(sequences)), sequences))

    def fill(self, rows: Sequence[PlanRow], sequences: Sequence[SequenceState]) -> BatchInput:
        """As DecodeBatch's, of at most as many rows, after `begin`."""
        count, settings = len(rows), self.batch.settings
        assert settings is not None, "it was made with them"
        self.write(rows, sequences)
        for index, sequence in enumerate(sequences):
            self.drawn[index] = sequence.num_output_tokens
        settings.filters = any(self.filtering[:count])
        if count < len(self.held):
            self.pad(count)
        if self.copied is not None:
            self.memory.device.copy_(self.memory.host, non_blocking=True)
            self.copied.record()
        return self.batch

    def pad(self, count: int) -> None:
        """Make the rows from `count` on the shortest one's, whose block ids all lie within the cache."""
        arrays, rest = self.memory.arrays, slice(count, len(self.held))
        shortest = int(arrays["seq_lens"][:count].argmin())
        for name in ("token_ids", "positions", "seq_lens"):
            arrays[name][rest] = arrays[name][shortest]
        for group, table in enumerate(self.tables):
            table[rest] = table[shortest]
            arrays[f"slots {group}"][rest] = NOWHERE
        arrays["temperature"][rest] = 0.0
        self.held[rest] = [None] * (len(self.held) - count)
