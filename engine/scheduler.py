"""Scheduler: turns waiting and running sequences into step plans, and step results into output. No tensor in sight.

Every step takes decode rows first, then further chunks of prompts under way, then new sequences, from one token budget:
there are no phases. All three go by priority, then arrival. A sequence that finds no block takes those of the last one
in that order, which is computed again later (the first in order always fits alone, so something always advances). With
several plans in flight a long prompt has chunks in several of them, and decode rows spread evenly.
"""

from bisect import bisect_left, insort
from collections import deque
from typing import NamedTuple

from shoal.configs.schema import SchedulerConfig
from shoal.engine.admission import Admission
from shoal.engine.block_tables import BlockTables
from shoal.engine.cost_model import CostModel, StepLoad
from shoal.engine.executor import Capacity
from shoal.engine.messages import NewSequence, OutputDelta, PlanRow, StepPlan, StepResult, TokenRef
from shoal.engine.result_check import check_result
from shoal.engine.sequence import Sequence, Status
from shoal.engine.step_budget import StepBudget


class Launched(NamedTuple):
    """A plan without a result: the sequence of each of its rows, and what it holds."""

    plan: StepPlan
    sequences: list[Sequence]
    load: StepLoad


class Draft:
    """A plan while it is made."""

    __slots__ = ("budget", "new_sequences", "preempted", "rows", "sequences", "unsettled", "waiting")

    def __init__(self, budget: StepBudget) -> None:
        self.budget = budget
        self.rows: list[PlanRow] = []
        self.sequences: list[Sequence] = []
        self.unsettled: list[Sequence] = []  # rows that fill a block, or may leave a window
        self.new_sequences: list[NewSequence] = []
        self.preempted = False
        self.waiting: Sequence | None = None  # finds no block while later ones are in flight


def _order(seq: Sequence) -> tuple[int, float, int]:
    return seq.order


class Scheduler:
    """Continuous batching over the block tables.

    schedule -> (ranks) -> update, with up to capacity.most_launched plans between them.
    """

    def __init__(
        self, config: SchedulerConfig, capacity: Capacity, *, enable_prefix_caching: bool = True, epoch: int = 0
    ) -> None:
        self.config, self.epoch = config, epoch
        self.max_in_flight, self.vocab_size = capacity.max_in_flight, capacity.vocab_size
        self.most_launched, self.overlap = capacity.most_launched, capacity.overlap
        self.max_num_running = min(config.max_num_seqs, config.max_num_batched_tokens * capacity.max_in_flight)
        self.tables = BlockTables(capacity, enable_prefix_caching=enable_prefix_caching)
        self.admission = Admission(self.tables)
        self.cost = CostModel()
        self.learns_cost = config.inter_token_limit_s is not None or capacity.max_in_flight > 1
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.launched: deque[Launched] = deque()
        self.num_steps = self.num_preemptions = 0
        self.num_prompt_tokens = self.num_generated_tokens = self.num_queried_tokens = self.num_hit_tokens = 0
        self._waiting_tokens = 0
        self._finished_ids: list[str] = []
        self._preempted_ids: list[str] = []
        self._refused: Sequence | None = None  # did not fit; asked again only when a sequence has left the running set

    @property
    def short_of_blocks(self) -> bool:
        """Whether the first in the queue waits for blocks, and not for a seat."""
        return self._refused is not None

    def add(self, seq: Sequence) -> None:
        """Queue a sequence, new or preempted, at its place."""
        seq.status = Status.WAITING
        insort(self.waiting, seq, key=_order)
        self._waiting_tokens += len(seq.tokens)

    def finish(self, seq: Sequence, *, trusted: bool = True) -> None:
        """Take a sequence out, at any time: what is in flight for it is ignored.

        trusted: its blocks may serve others.
        """
        if seq.status is Status.RUNNING:
            if trusted and self.overlap:
                self.tables.settle(seq)  # tokens that were not known when their row was scheduled
            self._leave_running(seq, self._finished_ids, trusted=trusted)
        elif seq.status is Status.WAITING:
            self._leave_waiting(bisect_left(self.waiting, seq.order, key=_order))
        seq.status = Status.FINISHED

    def _leave_waiting(self, index: int) -> Sequence:
        seq = self.waiting.pop(index)
        self._waiting_tokens -= len(seq.tokens)
        return seq

    def _leave_running(self, seq: Sequence, told: list[str], *, trusted: bool = True) -> None:
        del self.running[bisect_left(self.running, seq.order, key=_order)]
        self.admission.leave(seq)
        self.tables.release(seq, trusted=trusted)
        told.append(seq.request_id)
        self._refused = None

    def _preempt(self, draft: Draft, seq: Sequence) -> None:
        self._leave_running(seq, self._preempted_ids)
        self.add(seq)
        draft.preempted = True
        self.num_preemptions += 1

    def schedule(self) -> StepPlan | None:
        """The next plan, to be launched before any other call; None when nothing can run before a result comes."""
        draft, decoding, prefilling = self._survey()
        self._decode(draft, decoding)
        self._prefill(draft, prefilling)
        if not draft.preempted and draft.waiting is None:
            self._admit(draft)
        return self._commit(draft) if draft.rows else None

    def _survey(self) -> tuple[Draft, list[Sequence], list[Sequence]]:
        """An empty draft with its budget, and the running sequences that wait for a decode row or a further chunk."""
        decoding, prefilling = [], []
        decode_cost, prefill, balanced = 0.0, self._waiting_tokens, self.max_in_flight > 1
        for seq in self.running:
            pending = len(seq.tokens) - seq.num_computed
            if pending > 1:
                prefilling.append(seq)
                prefill += pending
                continue
            if pending == 1 or (pending == 0 and self.overlap and seq.may_follow):
                decoding.append(seq)
            if balanced:
                decode_cost += self.cost.row_cost(1, seq.num_computed)
        for launched in self.launched:
            prefill += launched.load.prefill_tokens
        budget = StepBudget(
            self.config,
            self.cost,
            self.max_in_flight,
            decoding=len(prefilling) < len(self.running),
            decode_cost=decode_cost,
            outstanding_prefill=prefill,
        )
        return Draft(budget), decoding, prefilling

    def _decode(self, draft: Draft, decoding: list[Sequence]) -> None:
        """A row for every running sequence of which only the last token is not computed, be it known yet or not."""
        budget, balanced, size, running = draft.budget, self.max_in_flight > 1, self.tables.block_size, Status.RUNNING
        rows = attended = 0
        for seq in decoding:
            if rows >= budget.tokens or budget.share <= 0.0:
                break
            if seq.status is not running:
                continue
            position = seq.num_computed
            if position < len(seq.tables[0]) * size or self._make_room(draft, seq, 1):
                rows += 1
                attended += position + 1
                if balanced:
                    budget.share -= self.cost.row_cost(1, position)
                self._add_row(draft, seq, 1)
            elif self.overlap:  # rows of later ones are always in flight: none more, so that it can have their blocks
                draft.waiting = seq
                break
        budget.take_decode(rows, attended)

    def _prefill(self, draft: Draft, prefilling: list[Sequence]) -> None:
        """A further chunk for running sequences with more than one token to compute."""
        for seq in prefilling:
            chunk = draft.budget.chunk(seq.pending, seq.num_computed)
            if chunk <= 0:
                return
            if seq.status is not Status.RUNNING:
                continue
            if draft.waiting is not None and draft.waiting.order < seq.order:
                return
            if room := self._make_room(draft, seq, chunk):
                draft.budget.take_prefill(room, seq.num_computed)
                self._add_row(draft, seq, room)
            elif self.overlap:
                draft.waiting = seq
                return

    def _admit(self, draft: Draft) -> None:
        """First chunks of waiting sequences while the running set will fit.

        One whose prefix is just being computed waits for it.
        """
        seats = self.max_num_running - len(self.running)
        for seq in self.waiting[: max(0, seats)]:
            if self.tables.is_coming(seq):
                continue
            if seq is self._refused or draft.budget.chunk(1, 0) <= 0:
                return
            hit = self.tables.find_hit(seq)
            if self.tables.is_coming(seq):
                continue
            num_computed = hit * self.tables.block_size
            chunk = draft.budget.chunk(len(seq.tokens) - num_computed, num_computed)
            if chunk <= 0:
                return
            if self.running and not self.admission.fits(self.running, seq, hit):
                self._refused = seq
                return
            self.tables.attach(seq, hit)
            chunk = self.tables.room(seq, chunk)
            if not chunk:
                self.tables.release(seq)
                self._refused = seq
                return
            self._start(draft, seq, chunk)

    def _start(self, draft: Draft, seq: Sequence, chunk: int) -> None:
        """Move an admitted sequence to the running set with its first row."""
        self._leave_waiting(bisect_left(self.waiting, seq.order, key=_order))
        seq.status = Status.RUNNING
        insort(self.running, seq, key=_order)
        self.admission.enter(seq)
        if not seq.started:
            seq.started = True
            seq.num_cached_tokens = min(seq.num_computed, seq.num_prompt_tokens)
            self.num_prompt_tokens += seq.num_prompt_tokens
            if self.tables.enable_prefix_caching:
                self.num_queried_tokens += len(seq.tokens)
                self.num_hit_tokens += seq.num_computed
        draft.new_sequences.append(seq.announcement())
        draft.budget.take_prefill(chunk, seq.num_computed)
        self._add_row(draft, seq, chunk)

    def _make_room(self, draft: Draft, seq: Sequence, num_tokens: int) -> int:
        """How many of the sequence's next tokens have room. If none has, later sequences lose their blocks.

        Those with a row in this plan or in flight keep theirs; 0 means to wait for them.
        """
        while not (room := self.tables.room(seq, num_tokens)):
            victim = next((last for last in reversed(self.running) if last is seq or not last.in_flight), seq)
            if victim is seq:
                return 0
            self._preempt(draft, victim)
        return room

    def _add_row(self, draft: Draft, seq: Sequence, num_tokens: int) -> None:
        """Grant the blocks of a sequence's next tokens and count them as computed: later steps run after this one."""
        tables, tokens, start = self.tables, seq.tokens, seq.num_computed
        stop, known, size = start + num_tokens, len(tokens), tables.block_size
        ref = seq.last_row if start == known else None  # the token that row gives is this row's first
        new_block_ids = tables.no_blocks if stop <= len(seq.tables[0]) * size else tables.append(seq, num_tokens)
        told, last = tokens[seq.num_told :], stop >= known
        draft.rows.append(PlanRow(seq.request_id, start, num_tokens, told, new_block_ids, seq.last_blocks, last, ref))
        if last and self.overlap:
            seq.last_row = TokenRef(self.num_steps, len(draft.sequences))
        draft.sequences.append(seq)
        seq.num_told, seq.num_computed = stop if last else known, stop
        seq.in_flight += 1
        if tables.windowed or ((known if last else stop) // size > seq.num_published and tables.enable_prefix_caching):
            draft.unsettled.append(seq)

    def _commit(self, draft: Draft) -> StepPlan:
        """The plan of a draft. What it fills and frees is for later steps, not for its own rows."""
        for seq in draft.unsettled:
            self.tables.settle(seq)
        plan = StepPlan(
            epoch=self.epoch,
            step=self.num_steps,
            rows=draft.rows,
            new_sequences=draft.new_sequences,
            finished_ids=self._finished_ids,
            preempted_ids=self._preempted_ids,
        )
        self._finished_ids, self._preempted_ids = [], []
        self.launched.append(Launched(plan, draft.sequences, draft.budget.load))
        self.num_steps += 1
        return plan

    def update(self, result: StepResult, seconds: float, *, tell_joined: bool = True) -> list[OutputDelta]:
        """Take the oldest launched plan's result, which took so long; what there is to tell. tell_joined: of requests
        that may wait for it, too.

        Raises ExecutorFailed when it is not that plan's.
        """
        plan, sequences, load = self.launched.popleft()
        check_result(plan, sequences, result, self.vocab_size)
        if self.learns_cost:
            self.cost.observe(load, seconds)
        deltas, running, generated = [], Status.RUNNING, 0
        for seq, row, given in zip(sequences, plan.rows, result.rows, strict=True):
            seq.in_flight -= 1
            if seq.status is not running:
                continue
            if given.error is not None:
                self.finish(seq, trusted=False)
                deltas.append(seq.take_delta("error", given.error))
                continue
            if given.prompt_logprobs:
                seq.take_prompt_logprobs(row.num_computed_tokens, given.prompt_logprobs)
            if not row.sample:
                continue
            seq.tokens += given.token_ids
            if given.logprobs:
                seq.logprobs += given.logprobs
            generated += 1
            reason = seq.finish_reason()
            if reason is not None:
                self.admission.observe(seq.num_output_tokens)
                self.finish(seq)
            elif not tell_joined and seq.may_wait():
                continue
            deltas.append(seq.take_delta(reason))
        self.num_generated_tokens += generated
        return deltas

    def check_integrity(self) -> None:
        """Assert that queues, tables and launched plans agree. Call between steps."""
        for queue, status in ((self.waiting, Status.WAITING), (self.running, Status.RUNNING)):
            orders = [seq.order for seq in queue]
            assert orders == sorted(set(orders)), f"{status} sequences are out of order"
            assert all(seq.status is status for seq in queue), f"a sequence in the queue is not {status}"
        assert self._waiting_tokens == sum(len(seq.tokens) for seq in self.waiting)
        assert all(not seq.in_flight and not seq.tables for seq in self.waiting), "a waiting sequence holds something"
        assert len(self.running) <= self.max_num_running and len(self.launched) <= self.most_launched
        rows = [seq for launched in self.launched for seq in launched.sequences]
        for seq in self.running:
            assert seq.in_flight == rows.count(seq), "rows in flight are miscounted"
            assert seq.pending or seq.in_flight, "a sequence has nothing to do"
        assert self.admission.most_blocks == sum(map(self.admission.most, self.running)), "admission counts others"
        self.tables.check_integrity(self.running)
