"""A fleet of replicas in virtual time: real engine loops over FakeExecutors, requests sent by a real routing policy.

Every replica has a clock of its own, which its steps move; the one that is furthest behind goes next, and a request
arrives when every replica has come past its moment or has nothing to do. No waiting, one thread, the same every time.
"""

import heapq
from collections.abc import Sequence

import msgspec

from shoal.configs.schema import ShoalConfig
from shoal.engine.cache_log import split_keys
from shoal.engine.clock import VirtualClock
from shoal.engine.engine_core import EngineCore
from shoal.engine.executor import Capacity
from shoal.engine.fake_executor import FakeExecutor, StepLatency
from shoal.engine.messages import OutputDelta, Request
from shoal.launcher.routing import Routing


class SimulatedRequest(msgspec.Struct):
    """What became of a request. ttft_s: arrival to first token."""

    replica: int
    arrival: float
    ttft_s: float = 0.0
    cached_tokens: int = 0


class _Replica:
    """A core with its clock and the outstanding tokens of its requests."""

    def __init__(self, config: ShoalConfig, capacity: Capacity, latency: StepLatency) -> None:
        self.clock = VirtualClock()
        executor = FakeExecutor(capacity, clock=self.clock, latency=latency, blind=True)
        self.core = EngineCore(config, executor, clock=self.clock)
        self.core.tell_cache()
        self.work: dict[str, int] = {}
        self.load = 0

    def work_left(self, request_id: str, change: int) -> None:
        """Outstanding tokens of a request, and so of the replica, grow or shrink."""
        self.work[request_id] = self.work.get(request_id, 0) + change
        self.load += change


class Fleet:
    """Replicas in virtual time. requests: what became of each, by id. loads: samples of all replicas' outstanding
    tokens, one per arrival.
    """

    def __init__(
        self, size: int, config: ShoalConfig, capacity: Capacity, latency: StepLatency, routing: Routing
    ) -> None:
        self._routing = routing
        self._replicas = [_Replica(config, capacity, latency) for _ in range(size)]
        self._live: dict[str, Request] = {}
        self.requests: dict[str, SimulatedRequest] = {}
        self.loads: list[list[int]] = []

    def run(self, arrivals: Sequence[Request]) -> None:
        """Serve requests that arrive at their `arrival`, in order, to the end of the last."""
        for request in arrivals:
            self._advance(request.arrival)
            self._send(request)
        self._advance(float("inf"))

    def _advance(self, moment: float) -> None:
        """Step every replica that has work until its clock is past the moment."""
        due = [(replica.clock.now, number) for number, replica in enumerate(self._replicas) if replica.core.has_work]
        heapq.heapify(due)
        while due and due[0][0] < moment:
            _, number = heapq.heappop(due)
            replica = self._replicas[number]
            self._step(number, replica)
            if replica.core.has_work:
                heapq.heappush(due, (replica.clock.now, number))
        if moment != float("inf"):
            for replica in self._replicas:
                replica.clock.sleep_until(moment)

    def _send(self, request: Request) -> None:
        loads = {number: replica.load for number, replica in enumerate(self._replicas)}
        self.loads.append(list(loads.values()))
        number = self._routing.rank(request, loads)[0]
        self._routing.sent(request, number)
        replica = self._replicas[number]
        replica.work_left(request.request_id, len(request.prompt_token_ids) + (request.sampling.max_tokens or 0))
        replica.core.add(request)
        self._live[request.request_id] = request
        self.requests[request.request_id] = SimulatedRequest(number, request.arrival)

    def _step(self, number: int, replica: _Replica) -> None:
        deltas = replica.core.step()
        changes = replica.core.cache_changes()
        if changes is not None:
            stored, removed = split_keys(changes.stored), split_keys(changes.removed)
            self._routing.cache_changed(number, stored, removed, anew=changes.anew)
        for delta in deltas:
            self._take(number, replica, delta)

    def _take(self, number: int, replica: _Replica, delta: OutputDelta) -> None:
        request, done = self._live[delta.request_id], self.requests[delta.request_id]
        replica.work_left(delta.request_id, -len(delta.token_ids))
        if delta.start == 0 and delta.token_ids:
            done.ttft_s = replica.clock.now - request.arrival
            done.cached_tokens = delta.num_cached_tokens
            replica.work_left(delta.request_id, -len(request.prompt_token_ids))
            self._routing.arrived(request, number)
        if delta.finish_reason is not None:
            assert delta.finish_reason == "length", delta.error
            del self._live[delta.request_id], replica.work[delta.request_id]
