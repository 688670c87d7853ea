"""BatchState: what a rank remembers of the running sequences, kept in step with the engine by the differences in each
StepPlan.

Every row of a plan is checked against this state: request, position, last blocks. A mismatch means that engine and rank
disagree, which is fatal and named.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from shoal.engine.decode_batch import DecodeBatch, Ragged, take_tokens
from shoal.engine.messages import NewSequence, PlanRow, StepPlan
from shoal.engine.padded_batch import MixedBatch, PaddedBatch
from shoal.engine.sequence_state import SequenceState
from shoal.model.batch import BatchInput, GroupTables
from shoal.model.memory_estimate import MOST_GRAPHS, GraphSizes

LEAST_SHARING_ROWS, LEAST_SHARED_KEYS = 4, 256  # below, one more pass over the batch costs more than reading keys again
LEAST_WIDTH = 16  # of a block table that is kept
LEAST_PADDED_KEYS = 512  # of a padded batch
MOST_PADDED = MOST_GRAPHS // 2  # batches kept: each has two graphs at most
MOST_SEEN = 512
Size = tuple[int, int, int]  # rows, tokens, width of block tables


class PlanMismatch(RuntimeError):
    """A plan does not fit what this rank holds."""


class Padding(NamedTuple):
    """Steps are padded to the next of these sizes; those of one token per row not where all rows but one would read so
    many keys again that they share, together.
    """

    sizes: GraphSizes
    shared_keys: int


class BatchState:
    """The running sequences of one rank, and the tensors a step's plan stands for."""

    def __init__(self, block_size: int, num_groups: int, device: torch.device, padding: Padding | None = None) -> None:
        self.block_size, self.num_groups, self.device = block_size, num_groups, device
        self.padding = padding
        self.sequences: dict[str, SequenceState] = {}
        self.decode: DecodeBatch | None = None
        self.padded: OrderedDict[Size, PaddedBatch] = OrderedDict()  # the longest unused first
        self.seen: OrderedDict[Size, int] = OrderedDict()  # sizes of steps, with the number of the first, likewise

    def apply(self, plan: StepPlan, sampled: Mapping[tuple[int, int], int]) -> None:
        """Drop, add and extend sequences as the plan says. sampled: (step, row) -> token of the plan's TokenRefs.
        Raises PlanMismatch."""
        for request_id in [*plan.finished_ids, *plan.preempted_ids]:
            gone = self.sequences.pop(request_id, None)
            if gone is not None:
                gone.counts, gone.token_ids = None, []  # batches may hold a sequence until its row is another's
        for new in plan.new_sequences:
            self.add(new)
        for row in plan.rows:
            sequence = self.sequences.get(row.request_id)
            if sequence is None:
                raise PlanMismatch(f"step {plan.step}: request {row.request_id} was never announced to this rank")
            if row.draft_token_ids:
                raise PlanMismatch(
                    f"step {plan.step}, request {row.request_id}: draft tokens, which ranks do not verify yet"
                )
            sequence.token_ids += row.token_ids
            if row.ref is not None:
                sequence.token_ids.append(sampled[row.ref.step, row.ref.row])
            if any(row.new_block_ids):
                for group, block_ids in enumerate(row.new_block_ids):
                    if block_ids:
                        sequence.append_blocks(group, block_ids)
            self.check(plan.step, row, sequence)

    def add(self, new: NewSequence) -> None:
        """Start to hold a sequence."""
        if new.request_id in self.sequences:
            raise PlanMismatch(f"request {new.request_id} was announced twice")
        if len(new.block_ids) != self.num_groups:
            raise PlanMismatch(f"request {new.request_id}: {len(new.block_ids)} block tables, {self.num_groups} groups")
        self.sequences[new.request_id] = SequenceState(
            request_id=new.request_id,
            token_ids=list(new.token_ids),
            num_prompt_tokens=new.num_prompt_tokens,
            sampling=new.sampling,
            seed=new.sampling.seed or 0,
            sample_index=new.sample_index,
            eos_token_ids=new.eos_token_ids,
            bad_words_token_ids=new.bad_words_token_ids,
            tables=[np.array(ids, np.int32) for ids in new.block_ids],
            num_blocks=[len(ids) for ids in new.block_ids],
        )

    def check(self, step: int, row: PlanRow, sequence: SequenceState) -> None:
        """Raise PlanMismatch when the row does not continue what this rank holds."""
        stop, room = row.num_computed_tokens + row.num_tokens, min(sequence.num_blocks) * self.block_size
        computed = sequence.num_computed_tokens
        fits = computed in (0, row.num_computed_tokens) and len(sequence.token_ids) >= stop <= room
        if fits and sequence.last_blocks == row.last_block_ids:
            return
        where = f"step {step}, request {row.request_id}"
        if computed not in (0, row.num_computed_tokens):
            raise PlanMismatch(
                f"{where}: the row starts at position {row.num_computed_tokens}, {computed} tokens are computed"
            )
        if stop > len(sequence.token_ids):
            raise PlanMismatch(f"{where}: needs {stop} tokens, {len(sequence.token_ids)} are known")
        for group, expected in enumerate(row.last_block_ids):
            used, last = sequence.num_blocks[group], sequence.last_blocks[group]
            if last != expected or used * self.block_size < stop:
                raise PlanMismatch(
                    f"{where}: cache group {group} ends with block {last} of {used} here, "
                    f"{expected} in the plan, for {stop} tokens"
                )

    def build(self, plan: StepPlan) -> BatchInput:
        """The tensors of the plan's rows, in their order; marks their tokens as computed. Call after apply, once. Valid
        until the next call."""
        sequences = [self.sequences[row.request_id] for row in plan.rows]
        if plan.rows and (batch := self.build_padded(plan, sequences)) is not None:
            return batch
        if plan.rows and self.device.type == "cpu" and all(row.num_tokens == 1 for row in plan.rows):
            return self.build_decode(plan, sequences)
        ragged = Ragged.of(plan.rows)
        seq_lens = (ragged.starts + ragged.counts).astype(np.int32)
        return BatchInput(
            token_ids_T=self.tensor(np.array(take_tokens(plan.rows, sequences), np.int64)),
            positions_T=self.tensor(ragged.positions),
            cu_seqlens_q=self.tensor(ragged.bounds.astype(np.int32)),
            seq_lens=self.tensor(seq_lens),
            max_seqlen_q=int(ragged.counts.max(initial=0)),
            max_seqlen_k=int(seq_lens.max(initial=0)),
            groups=tuple(self.group_tables(group, sequences, ragged) for group in range(self.num_groups)),
        )

    def build_decode(self, plan: StepPlan, sequences: list[SequenceState]) -> BatchInput:
        """The same, from what is there already, where every row has one token."""
        batch = None if self.decode is None else self.decode.fill(plan.rows, sequences)
        if batch is None:
            most = (max(used) for used in zip(*(one.num_blocks for one in sequences), strict=True))
            widths = [max(LEAST_WIDTH, 2 * used) for used in most]  # with room to grow
            self.decode = DecodeBatch(len(sequences), widths, self.block_size, self.device)
            batch = self.decode.fill(plan.rows, sequences)
            assert batch is not None, "it was made for them"
        return batch

    def build_padded(self, plan: StepPlan, sequences: list[SequenceState]) -> BatchInput | None:
        """The same, of a size that comes again, in tensors that stay; None where that would not help, or cannot be."""
        size = self.padded_size(plan, sequences)
        if size is None:
            return None
        rows, tokens, width = size
        padded = self.padded.pop(size, None)
        if padded is None:
            kind = MixedBatch if tokens > rows else PaddedBatch
            padded = kind(rows, tokens, width, self.num_groups, self.block_size, self.device)
        self.padded[size] = padded
        while len(self.padded) > MOST_PADDED:
            self.padded.popitem(last=False)
        fits = padded.begin(sequences)
        assert fits and self.padding is not None, "it was made for them"
        if tokens == rows:
            first, others = min([row.num_computed_tokens for row in plan.rows]), len(sequences) - 1
            if first * others > self.padding.shared_keys:
                shared = max(shared_keys(table[: others + 1], first, self.block_size) for table in padded.tables)
                if shared * others > self.padding.shared_keys:
                    return None
        return padded.fill(plan.rows, sequences)

    def padded_size(self, plan: StepPlan, sequences: list[SequenceState]) -> Size | None:
        """What to pad a step to. Mixed steps have many sizes: theirs are padded from the second of a size on."""
        if self.padding is None:
            return None
        sizes, count = self.padding.sizes, len(sequences)
        total = sum([row.num_tokens for row in plan.rows])
        blocks = max(LEAST_PADDED_KEYS // self.block_size, max([one.num_blocks[0] for one in sequences]))
        if total == count:
            rows = next((size for size in sizes.rows if size >= count), None)
            return None if rows is None else (rows, rows, 1 << (blocks - 1).bit_length())
        rows = next((size for size in sizes.mixed_rows if size >= count), None)
        tokens = next((size for size in sizes.tokens if size >= max(total, (rows or 0) + 1)), None)
        if rows is None or tokens is None:
            return None
        least = LEAST_PADDED_KEYS // self.block_size
        size = rows, tokens, least << 2 * (((blocks - 1) // least).bit_length() + 1 >> 1)
        first = self.seen.pop(size, plan.step)
        self.seen[size] = first
        while len(self.seen) > MOST_SEEN:
            self.seen.popitem(last=False)
        return None if first == plan.step else size

    def group_tables(self, group: int, sequences: list[SequenceState], ragged: Ragged) -> GroupTables:
        """Block table and slots of one cache group."""
        width = max((sequence.num_blocks[group] for sequence in sequences), default=0)
        table = np.full((len(sequences), width), -1, np.int32)
        for row, sequence in enumerate(sequences):
            used = sequence.num_blocks[group]
            table[row, :used] = sequence.tables[group][:used]
        slots = ragged.slots(table, self.block_size)
        shared = shared_keys(table, int(ragged.starts.min()), self.block_size) if self.device.type == "cuda" else 0
        return GroupTables(self.tensor(table), self.tensor(slots), shared)

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """The array on this rank's device. From pinned memory, so that the copy waits for nothing; the allocator of
        pinned memory keeps it until the copy is done."""
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)


def shared_keys(table_RB: np.ndarray, first_position: int, block_size: int) -> int:
    """How many first keys all rows hold in the same blocks, at most first_position; 0 where sharing would not pay."""
    if len(table_RB) < LEAST_SHARING_ROWS or first_position < LEAST_SHARED_KEYS or (table_RB[:, 0] < 0).any():
        return 0
    equal = (table_RB[:, : first_position // block_size] == table_RB[0, : first_position // block_size]).all(0)
    keys = block_size * int(len(equal) if equal.all() else equal.argmin())
    return keys if keys >= LEAST_SHARED_KEYS else 0
