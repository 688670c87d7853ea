"""FakeExecutor: an executor without ranks. It checks every plan (`fake_ranks`), samples from a hash (`fake_model`).

Time is a clock's, real or virtual; faults can be planned. It drives tests of scheduler, controller and server, and
planning.
"""

from collections import deque

import msgspec

from shoal.engine.clock import Clock
from shoal.engine.executor import Capacity, Executor, ExecutorFailed
from shoal.engine.fake_ranks import FakeRanks, PlanError
from shoal.engine.messages import RowResult, StepPlan, StepResult, TokenRef

BLIND_TOKEN = 0


class StepLatency(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of a step through all stages: base_s + row_s per row + token_s per computed token."""

    base_s: float = 0.0
    row_s: float = 0.0
    token_s: float = 0.0

    def seconds(self, plan: StepPlan) -> float:
        """Of this plan."""
        return self.base_s + self.row_s * len(plan.rows) + self.token_s * sum(row.num_tokens for row in plan.rows)


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """A rank's end.

    From `step` on the executor fails: when launching, or when asked for the result; `hangs` lets that time out first.
    """

    step: int
    at_launch: bool = False
    hangs: bool = False
    rank: int = 0
    cause: str = "ended by a planned fault"


class BlindRanks:
    """Ranks that check nothing and answer BLIND_TOKEN: quick enough for planning and for fleets in virtual time."""

    def __init__(self) -> None:
        self.sequences: dict[str, None] = {}

    def run(self, plan: StepPlan, sampled: dict[TokenRef, tuple[str, int]]) -> list[RowResult]:
        """Answer a plan."""
        for request_id in (*plan.finished_ids, *plan.preempted_ids):
            self.sequences.pop(request_id, None)
        self.sequences.update(dict.fromkeys(new.request_id for new in plan.new_sequences))
        return [RowResult(row.request_id, [BLIND_TOKEN] if row.sample else []) for row in plan.rows]


class FakeExecutor(Executor):
    """Runs plans on FakeRanks.

    With a latency, stages work like a pipeline: a plan's result comes when its last stage is done with it.
    """

    def __init__(
        self,
        capacity: Capacity,
        *,
        clock: Clock | None = None,
        latency: StepLatency | None = None,
        fault: Fault | None = None,
        max_num_batched_tokens: int | None = None,
        max_num_seqs: int | None = None,
        blind: bool = False,
    ) -> None:
        """latency: None takes no time.

        fault: None never fails. The two numbers are limits that plans are checked against. blind: see BlindRanks.
        """
        self.capacity, self.clock, self.latency, self.fault = capacity, clock or Clock(), latency, fault
        self.max_num_batched_tokens, self.max_num_seqs = max_num_batched_tokens, max_num_seqs
        self.ranks: FakeRanks | BlindRanks = BlindRanks() if blind else FakeRanks(capacity)
        self.stopped = False
        self._unanswered: deque[tuple[StepResult, float]] = deque()
        self._stage_free = [0.0] * capacity.max_in_flight
        self._next_step, self._epoch = 0, -1

    def launch(self, plan: StepPlan) -> int:
        """Check and apply the plan. Raises PlanError, or the planned fault."""
        self._fail_if(plan.step, at_launch=True)
        if self.stopped or len(self._unanswered) >= self.capacity.most_launched:
            raise PlanError(f"step {plan.step}: {len(self._unanswered)} plans in flight, stopped: {self.stopped}")
        if plan.epoch != self._epoch and self._next_step == 0:
            self._epoch = plan.epoch
        if (plan.epoch, plan.step) != (self._epoch, self._next_step) or not plan.rows:
            raise PlanError(f"step {plan.step} of epoch {plan.epoch} is out of order or empty")
        num_tokens = sum(row.num_tokens for row in plan.rows)
        if num_tokens > (self.max_num_batched_tokens or num_tokens):
            raise PlanError(f"step {plan.step}: {num_tokens} tokens, limit {self.max_num_batched_tokens}")
        sampled = {
            TokenRef(result.step, row): (given.request_id, given.token_ids[0])
            for result, _ in self._unanswered
            for row, given in enumerate(result.rows)
            if given.token_ids
        }
        result = StepResult(epoch=plan.epoch, step=plan.step, rows=self.ranks.run(plan, sampled))
        if len(self.ranks.sequences) > (self.max_num_seqs or len(self.ranks.sequences)):
            raise PlanError(f"step {plan.step}: {len(self.ranks.sequences)} sequences, limit {self.max_num_seqs}")
        self._unanswered.append((result, self._through_stages(plan)))
        self._next_step += 1
        return plan.step

    def _through_stages(self, plan: StepPlan) -> float:
        """The moment the last stage is done with the plan."""
        moment = self.clock.monotonic()
        seconds = 0.0 if self.latency is None else self.latency.seconds(plan) / len(self._stage_free)
        for stage, free in enumerate(self._stage_free):
            moment = self._stage_free[stage] = max(moment, free) + seconds
        return moment

    def result(self, handle: int, timeout_s: float) -> StepResult:
        """The oldest launched plan's result, when its time has come."""
        self._fail_if(handle, at_launch=False, timeout_s=timeout_s)
        if not self._unanswered or self._unanswered[0][0].step != handle:
            raise PlanError(f"the result of step {handle} is asked for out of order")
        result, moment = self._unanswered.popleft()
        if self.latency is not None:
            limit = self.clock.monotonic() + timeout_s
            self.clock.sleep_until(min(moment, limit))
            if moment > limit:
                raise ExecutorFailed(f"step {handle} gave no result within {timeout_s} s")
        return result

    def _fail_if(self, step: int, *, at_launch: bool, timeout_s: float = 0.0) -> None:
        fault = self.fault
        if fault is None or step < fault.step or at_launch != fault.at_launch:
            return
        if fault.hangs:
            self.clock.sleep_until(self.clock.monotonic() + timeout_s)
            raise ExecutorFailed(f"step {step} gave no result within {timeout_s} s", fault.rank)
        raise ExecutorFailed(fault.cause, fault.rank)

    def health(self) -> None:
        """Raise the planned fault once its step has been reached, unless it is a hang."""
        fault = self.fault
        if fault is not None and not fault.hangs and self._next_step >= fault.step:
            raise ExecutorFailed(fault.cause, fault.rank)

    def stop(self) -> None:
        """Take no more plans."""
        self.stopped = True
