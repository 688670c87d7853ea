"""FakeRanks: the state of imaginary ranks, against which every plan is checked as strictly as a rank could, and more.

They hold what a rank holds (tokens, block tables, computed positions) and a cache whose every slot names the prefix it
was computed from. A row reads its context before the plan writes anything: a stale, foreign or missing block is a
PlanError that says which.
"""

from shoal.engine.executor import Capacity, ExecutorFailed
from shoal.engine.fake_model import EMPTY, FakeModel, prefix_states
from shoal.engine.messages import NewSequence, PlanRow, RowResult, StepPlan, TokenLogprobs, TokenRef
from shoal.engine.prefix_cache import first_visible_block


class PlanError(ExecutorFailed):
    """A plan contradicts what the ranks hold."""


class FakeSequence:
    """What a rank holds of a sequence.

    states[i]: the prefix up to token i. first_live: per group, its first entry that may be read.
    """

    def __init__(self, new: NewSequence) -> None:
        self.new = new
        self.tokens: list[int] = []
        self.states: list[int] = []
        self.tables = [list(ids) for ids in new.block_ids]
        self.first_live = [0] * len(new.block_ids)
        self.num_computed: int | None = None
        self.learn(new.token_ids)

    def learn(self, token_ids: list[int]) -> None:
        """Append tokens."""
        self.states += prefix_states(token_ids, self.states[-1] if self.states else EMPTY)
        self.tokens += token_ids


class FakeRanks:
    """The state behind a FakeExecutor: applies plans, raises PlanError."""

    def __init__(self, capacity: Capacity) -> None:
        self.capacity, self.model = capacity, FakeModel(capacity.vocab_size)
        self.sequences: dict[str, FakeSequence] = {}
        size = capacity.block_size
        self.slots: list[list[list[int | None]]] = [
            [[None] * size for _ in range(g.num_blocks)] for g in capacity.groups
        ]
        self.holders = [[0] * group.num_blocks for group in capacity.groups]
        self.step = 0

    def run(self, plan: StepPlan, sampled: dict[TokenRef, tuple[str, int]]) -> list[RowResult]:
        """Check and apply a plan. sampled: what launched plans without a result have chosen, by step and row."""
        self.step = plan.step
        for request_id in [*plan.finished_ids, *plan.preempted_ids]:
            if request_id not in self.sequences:
                raise self.error(request_id, "is dropped but not held")
            self.hold(self.sequences.pop(request_id), -1)
        for new in plan.new_sequences:
            self.announce(new)
        if len({row.request_id for row in plan.rows}) != len(plan.rows):
            raise PlanError(f"step {plan.step}: a request has two rows")
        for row in plan.rows:
            self.extend(row, sampled)
        for row in plan.rows:
            self.read(row)
        return [self.compute(row) for row in plan.rows]

    def error(self, request_id: str, what: str) -> PlanError:
        """A PlanError with its place."""
        return PlanError(f"step {self.step}, request {request_id}: {what}")

    def hold(self, sequence: FakeSequence, change: int) -> None:
        """Count a sequence's live blocks in or out."""
        for holders, table, first in zip(self.holders, sequence.tables, sequence.first_live, strict=True):
            for block in table[first:]:
                holders[block] += change

    def announce(self, new: NewSequence) -> None:
        """Start to hold a sequence."""
        if new.request_id in self.sequences:
            raise self.error(new.request_id, "is announced twice")
        if len(new.block_ids) != len(self.capacity.groups) or not 0 < new.num_prompt_tokens <= len(new.token_ids):
            raise self.error(new.request_id, "is announced with the wrong number of groups or tokens")
        if new.sampling.seed is None:
            raise self.error(new.request_id, "has no seed")
        sequence = self.sequences[new.request_id] = FakeSequence(new)
        for group, table in enumerate(sequence.tables):
            self.check_blocks(new.request_id, group, [block for block in table if block != -1])
            sequence.first_live[group] = table.count(-1)
            if -1 in table[table.count(-1) :]:
                raise self.error(new.request_id, f"has a hole in its blocks of group {group}")
        self.hold(sequence, +1)

    def check_blocks(self, request_id: str, group: int, blocks: list[int]) -> None:
        """Raise when a block does not exist."""
        if any(not 0 <= block < self.capacity.groups[group].num_blocks for block in blocks):
            raise self.error(
                request_id, f"names blocks {blocks} of group {group}, which has {len(self.holders[group])}"
            )

    def extend(self, row: PlanRow, sampled: dict[TokenRef, tuple[str, int]]) -> None:
        """Append a row's tokens and blocks to its sequence, and check its place in it."""
        sequence = self.sequences.get(row.request_id)
        if sequence is None:
            raise self.error(row.request_id, "has a row but was not announced")
        sequence.learn(row.token_ids)
        if row.ref is not None:
            owner, token_id = sampled.get(row.ref, ("", -1))
            if owner != row.request_id:
                raise self.error(row.request_id, f"refers to {row.ref}, which is not a token of its own in flight")
            sequence.learn([token_id])
        if row.draft_token_ids:
            raise self.error(row.request_id, "has draft tokens, which are not supported yet")
        for group, (table, blocks) in enumerate(zip(sequence.tables, row.new_block_ids, strict=True)):
            self.check_blocks(row.request_id, group, blocks)
            table += blocks
            for block in blocks:
                self.holders[group][block] += 1
        self.check_row(row, sequence)

    def check_row(self, row: PlanRow, sequence: FakeSequence) -> None:
        """Raise when the row does not continue its sequence."""
        start, stop = row.num_computed_tokens, row.num_computed_tokens + row.num_tokens
        if sequence.num_computed is None:  # the first row continues the blocks found in the cache
            cached = len(sequence.tables[0]) - len(row.new_block_ids[0])
            if start > cached * self.capacity.block_size:
                raise self.error(row.request_id, f"starts at position {start} with {cached} cached blocks")
        elif start != sequence.num_computed:
            raise self.error(row.request_id, f"starts at position {start}, computed are {sequence.num_computed}")
        if row.num_tokens < 1 or stop > len(sequence.tokens) or stop > self.capacity.max_model_len:
            raise self.error(row.request_id, f"computes {start} to {stop} of {len(sequence.tokens)} tokens")
        if row.sample != (stop == len(sequence.tokens)):
            raise self.error(row.request_id, f"has sample={row.sample} at {stop} of {len(sequence.tokens)} tokens")
        for table, last in zip(sequence.tables, row.last_block_ids, strict=True):
            if not table or table[-1] != last or len(table) * self.capacity.block_size < stop:
                raise self.error(row.request_id, f"has table {table}, the plan ends it with {last} for {stop} tokens")

    def read(self, row: PlanRow) -> None:
        """Check every cached position that the row's tokens see."""
        sequence, size = self.sequences[row.request_id], self.capacity.block_size
        start = row.num_computed_tokens
        for group, table in enumerate(sequence.tables):
            window = self.capacity.groups[group].window
            first = 0 if window is None else max(0, start - window + 1)
            for index in range(first // size, -(-start // size)):
                low, high = max(first, index * size), min(start, (index + 1) * size)
                held = self.slots[group][table[index]] if index >= sequence.first_live[group] else None
                if held is None or held[low - index * size : high - index * size] != sequence.states[low:high]:
                    where = f"positions {low} to {high} of group {group} in block {table[index]}"
                    raise self.error(row.request_id, f"reads {where}, which holds something else")

    def compute(self, row: PlanRow) -> RowResult:
        """Write a row's positions, and sample."""
        sequence, size = self.sequences[row.request_id], self.capacity.block_size
        start, stop = row.num_computed_tokens, row.num_computed_tokens + row.num_tokens
        for group, table in enumerate(sequence.tables):
            for index in range(start // size, -(-stop // size)):
                low, high = max(start, index * size), min(stop, (index + 1) * size)
                if self.holders[group][table[index]] != 1:
                    raise self.error(row.request_id, f"writes block {table[index]} of group {group}, which others hold")
                self.slots[group][table[index]][low - index * size : high - index * size] = sequence.states[low:high]
        sequence.num_computed = stop
        self.drop_unseen(sequence)
        return self.sample(row, sequence)

    def drop_unseen(self, sequence: FakeSequence) -> None:
        """What no later token of the sequence reads may be given to others."""
        assert sequence.num_computed is not None
        for group, spec in enumerate(self.capacity.groups):
            first = first_visible_block(sequence.num_computed, spec.window, self.capacity.block_size)
            for block in sequence.tables[group][sequence.first_live[group] : first]:
                self.holders[group][block] -= 1
            sequence.first_live[group] = max(first, sequence.first_live[group])

    def sample(self, row: PlanRow, sequence: FakeSequence) -> RowResult:
        """The row's result."""
        new, sampling = sequence.new, sequence.new.sampling
        token_ids: list[int] = []
        logprobs: list[TokenLogprobs] | None = None
        prompt_logprobs: list[TokenLogprobs] | None = None
        if row.sample:
            token_id = self.model.next_token(
                sequence.states[-1],
                sampling,
                sample_index=new.sample_index,
                num_output_tokens=len(sequence.tokens) - new.num_prompt_tokens,
                eos_token_ids=new.eos_token_ids,
            )
            token_ids = [token_id]
            if sampling.logprobs is not None:
                logprobs = [self.model.logprobs(sequence.states[-1], token_id, sampling.logprobs)]
        if sampling.prompt_logprobs is not None:
            stop = min(row.num_computed_tokens + row.num_tokens, new.num_prompt_tokens - 1)
            prompt_logprobs = [
                self.model.logprobs(sequence.states[at], sequence.tokens[at + 1], sampling.prompt_logprobs)
                for at in range(row.num_computed_tokens, stop)
            ]
        return RowResult(row.request_id, token_ids, logprobs, prompt_logprobs)
