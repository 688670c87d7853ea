"""MultiRankExecutor: runs step plans on the ranks of a replica, each its own process, over the control channel. No
torch.
"""

import time
from collections import deque

from shoal.engine.executor import Capacity, Executor
from shoal.engine.messages import StepPlan, StepResult
from shoal.engine.rank_links import RankLinks
from shoal.engine.rank_messages import Ping
from shoal.engine.rank_watch import LOOK_INTERVAL_S, RankWatch

PING_INTERVAL_S = 60.0


class MultiRankExecutor(Executor):
    """Sends each plan to every rank; the rank that samples answers. links: to ranks that have their cache."""

    def __init__(
        self, links: RankLinks, capacity: Capacity, *, sampling_rank: int, step_timeout_s: float, stop_timeout_s: float
    ) -> None:
        self.capacity = capacity
        self._links, self._sampling_rank = links, sampling_rank
        self._step_timeout_s, self._stop_timeout_s = step_timeout_s, stop_timeout_s
        self._results: deque[StepResult] = deque()
        self._next_ping = self._next_look = 0.0

    def launch(self, plan: StepPlan) -> int:
        """Send the plan to every rank."""
        self._links.broadcast(plan, self._step_timeout_s)
        return plan.step

    def result(self, handle: int, timeout_s: float) -> StepResult:
        """The result of a plan. Raises ExecutorFailed naming the failed rank and its cause, or what each rank was
        doing.
        """
        deadline = time.monotonic() + timeout_s
        while not self._results:
            left = deadline - time.monotonic()
            if left <= 0:
                cause = f"step {handle} gave no result within {timeout_s:g} s (launcher.step_timeout_s)"
                self._links.fail_late(cause)
            self._take(min(left, LOOK_INTERVAL_S))
            if not self._results:
                self._links.check_hang(waiting=True)
        self._links.watch.step_done()
        self._look_at_times()
        result = self._results.popleft()
        if result.step != handle:
            self._links.fail(f"answered step {result.step} when step {handle} was due", self._sampling_rank)
        return result

    def _look_at_times(self) -> None:
        """While results come one after the other: a rank that no result needs may be gone all the same."""
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + LOOK_INTERVAL_S
            self._links.check_hang(waiting=False)

    def _take(self, timeout_s: float) -> None:
        for rank, message in self._links.receive(timeout_s):
            if rank == self._sampling_rank and isinstance(message, StepResult):
                self._results.append(message)
            else:
                self._links.fail(f"sent a {type(message).__name__}, which has no place while serving", rank)

    def health(self) -> None:
        """Look whether a rank has ended or failed; tell them now and then that the engine is there."""
        self._take(0.0)
        self._links.check_hang(waiting=False)
        now = time.monotonic()
        if now >= self._next_ping:
            self._next_ping = now + PING_INTERVAL_S
            self._links.try_broadcast(Ping())

    def stop(self) -> None:
        """End every rank."""
        self._links.stop(self._stop_timeout_s)

    @property
    def watch(self) -> RankWatch:
        """What the ranks said last."""
        return self._links.watch

    def fileno(self) -> int:
        """For selectors: readable when a rank has said something, so that `health` is worth a call."""
        return self._links.fileno()
