"""PagedModel: drives stages of a decoder without an engine. Random block tables, NaN in every slot no token owns.

model = PagedModel(spec, [stage], block_size=4)
model.add("a", [5, 3, 8])
logits = model.step([("a", 2)])["a"]        # [2, vocab_size], of the two positions computed
"""

import random

import torch

from shoal.model.batch import BatchInput, GroupTables
from shoal.model.decoder import Stage
from shoal.model.kv_cache import KVCache
from shoal.model.spec import DecoderSpec


class Sequence:
    """One sequence: its tokens, how many are computed, and a block table per cache group."""

    def __init__(self, token_ids: list[int], num_groups: int) -> None:
        self.token_ids, self.num_computed = list(token_ids), 0
        self.tables: list[list[int]] = [[] for _ in range(num_groups)]


class PagedModel:
    """Stages of one tensor rank, run one after the other in this process."""

    def __init__(
        self,
        spec: DecoderSpec,
        stages: list[Stage],
        block_size: int,
        num_blocks: int = 256,
        seed: int = 0,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        self.spec, self.stages, self.block_size = spec, stages, block_size
        self.windows = spec.cache_windows
        dtype, cpu, counts = cache_dtype or stages[0].dtype, torch.device("cpu"), [num_blocks] * len(self.windows)
        self.caches = [KVCache(spec, stage.shard, counts, block_size, dtype, cpu) for stage in stages]
        for cache in self.caches:
            for layer in cache.layers.values():
                layer.keys.fill_(float("nan"))
                layer.values.fill_(float("nan"))
        self.free = [
            random.Random(f"{seed}/{group}").sample(range(num_blocks), num_blocks) for group in range(len(counts))
        ]
        self.sequences: dict[str, Sequence] = {}

    def add(self, name: str, token_ids: list[int]) -> None:
        """A new sequence, nothing of it computed."""
        self.sequences[name] = Sequence(token_ids, len(self.windows))

    def release(self, group: int, block: int) -> None:
        """Give a block back; whoever reads it afterwards reads NaN."""
        for cache in self.caches:
            for layer in cache.layers.values():
                if layer.group == group:
                    layer.keys[block], layer.values[block] = float("nan"), float("nan")
        self.free[group].append(block)

    def remove(self, name: str) -> None:
        """End a sequence."""
        for group, table in enumerate(self.sequences.pop(name).tables):
            for block in table:
                if block >= 0:
                    self.release(group, block)

    def group_tables(self, group: int, rows: list[tuple[Sequence, int]]) -> GroupTables:
        """Tables and slots of the rows' new tokens; blocks are taken as needed."""
        for sequence, count in rows:
            while len(sequence.tables[group]) * self.block_size < sequence.num_computed + count:
                sequence.tables[group].append(self.free[group].pop())
        width = max((len(sequence.tables[group]) for sequence, _ in rows), default=0) + 1
        table = torch.full((len(rows), width), -1, dtype=torch.int32)
        slots = []
        for row, (sequence, count) in enumerate(rows):
            blocks = sequence.tables[group]
            table[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
            for position in range(sequence.num_computed, sequence.num_computed + count):
                slots.append(blocks[position // self.block_size] * self.block_size + position % self.block_size)
        return GroupTables(table, torch.tensor(slots, dtype=torch.int64))

    def batch(self, plan: list[tuple[str, int]]) -> BatchInput:
        """The next `count` tokens of each named sequence."""
        rows = [(self.sequences[name], count) for name, count in plan]
        places = [(sequence, sequence.num_computed + offset) for sequence, count in rows for offset in range(count)]
        counts, lengths = [count for _, count in rows], [sequence.num_computed + count for sequence, count in rows]
        return BatchInput(
            token_ids_T=torch.tensor([sequence.token_ids[at] for sequence, at in places], dtype=torch.int64),
            positions_T=torch.tensor([at for _, at in places], dtype=torch.int64),
            cu_seqlens_q=torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            max_seqlen_q=max(counts, default=0),
            max_seqlen_k=max(lengths, default=0),
            groups=tuple(self.group_tables(group, rows) for group in range(len(self.windows))),
        )

    def step(self, plan: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
        """Compute the next `count` tokens of each named sequence. Returns the logits of every position computed."""
        batch = self.batch(plan)
        hidden = self.stages[0].embed(batch)
        for stage, cache in zip(self.stages, self.caches):
            hidden = stage.forward(batch, hidden, cache)
        logits = self.stages[-1].logits(hidden)
        for name, count in plan:
            self.sequences[name].num_computed += count
            self.leave_windows(self.sequences[name])
        return {name: part for (name, _), part in zip(plan, logits.split([count for _, count in plan]))}

    def leave_windows(self, sequence: Sequence) -> None:
        """Free the blocks that no further token of the sequence will see."""
        for group, window in enumerate(self.windows):
            if window is None:
                continue
            for index in range(max(0, sequence.num_computed - window + 1) // self.block_size):
                if sequence.tables[group][index] >= 0:
                    self.release(group, sequence.tables[group][index])
                    sequence.tables[group][index] = -1

    def run(self, name: str, chunks: list[int]) -> torch.Tensor:
        """The logits of a whole sequence, computed in chunks: [len(tokens), vocab_size]."""
        return torch.cat([self.step([(name, count)])[name] for count in chunks])

    def greedy(self, name: str, count: int) -> list[int]:
        """Extend a sequence by the best token, count times."""
        sequence = self.sequences[name]
        for _ in range(count):
            pending = len(sequence.token_ids) - sequence.num_computed
            sequence.token_ids.append(int(self.step([(name, pending)])[name][-1].argmax()))
        return sequence.token_ids[-count:]


def random_chunks(total: int, rng: random.Random, largest: int) -> list[int]:
    """Positive sizes up to `largest` that sum to total."""
    chunks: list[int] = []
    while total > 0:
        chunks.append(min(total, rng.randint(1, largest)))
        total -= chunks[-1]
    return chunks
