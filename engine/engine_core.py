"""EngineCore: accepts requests, keeps the executor busy with the scheduler's plans, turns results into output deltas.

One thread owns it: `add` and `abort` between calls of `step`. It knows nothing of channels, processes or tensors.
"""

import random
from collections import deque

import msgspec

from shoal.configs.schema import ShoalConfig
from shoal.engine.admission import check_fits_alone
from shoal.engine.block_pool import BlockPool
from shoal.engine.cache_log import CacheChanges, CacheLog
from shoal.engine.client import EngineError, QueueFull
from shoal.engine.clock import Clock
from shoal.engine.executor import Executor, ExecutorFailed
from shoal.engine.messages import EngineStats, OutputDelta, Request
from shoal.engine.queue_wait import QueueWait
from shoal.engine.scheduler import Scheduler
from shoal.engine.sequence import Sequence

MIN_RETRY_S, MAX_RETRY_S = 1.0, 60.0
JOINED_S = 0.25  # of tokens that nobody follows one by one; telling of each costs more than the scheduler does


class EngineCore:
    """The engine of one replica.

    Every accepted request gets deltas from `step` until one has a finish_reason. When the executor fails, or anything
    else does, all live requests end with "error", `failure` holds the first cause, and nothing more is accepted.
    """

    def __init__(self, config: ShoalConfig, executor: Executor, *, clock: Clock | None = None, epoch: int = 0) -> None:
        """config: resolved.

        executor: ready; the owner of the core stops it. epoch: counts the lives of the executor's ranks.
        """
        self.config, self.executor, self.capacity = config, executor, executor.capacity
        self.clock = clock or Clock()
        self.scheduler = Scheduler(
            config.scheduler,
            executor.capacity,
            enable_prefix_caching=config.cache.enable_prefix_caching,
            epoch=epoch,
        )
        self._queue_wait = QueueWait(self.scheduler)
        self.failure: EngineError | None = None
        self._live: dict[str, Sequence] = {}
        self._outbox: list[OutputDelta] = []
        self._told_joined = float("-inf")  # when joined requests' deltas were told last
        self._handles: deque[tuple[int, float]] = deque()  # of launched plans, with the moment of their launch
        self._last_result = 0.0
        self._seeds = random.Random(config.runtime.seed)
        self._num_accepted = 0
        self._next_deadline = float("inf")
        self._engine_s = self._executor_s = 0.0
        self._forward_s = self._wait_s = self._sample_s = 0.0
        self._started = self.clock.monotonic()
        self._num_finished = 0
        self._told_pool: BlockPool | None = None

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._live or self._outbox or self._handles)

    def add(self, request: Request) -> None:
        """Accept a request.

        Raises ValueError (it cannot run here), QueueFull or EngineError, and is then as if never called.
        """
        started = self.clock.monotonic()
        if self.failure is not None:
            raise EngineError(str(self.failure)) from self.failure
        self._check(request)
        num_waiting = len(self.scheduler.waiting)
        seats = max(0, self.scheduler.max_num_running - len(self.scheduler.running))  # these come to no queue
        if num_waiting >= self.config.scheduler.max_queued_requests + seats:
            raise QueueFull(
                f"{num_waiting} requests wait already (scheduler.max_queued_requests): come back later, or raise it",
                self._retry_after_s(),
            )
        self._check_wait()
        sampling = request.sampling
        if sampling.seed is None:
            sampling = msgspec.structs.replace(sampling, seed=self._seeds.getrandbits(53))
        seq = Sequence(request, sampling, self.capacity.max_model_len, self._num_accepted)
        self._num_accepted += 1
        reason = seq.finish_reason()
        if reason is not None:
            self._outbox.append(seq.take_delta(reason))
        else:
            self._live[request.request_id] = seq
            self.scheduler.add(seq)
            if request.deadline_s is not None:
                self._next_deadline = min(self._next_deadline, request.deadline_s)
        self._engine_s += self.clock.monotonic() - started

    def _check(self, request: Request) -> None:
        """Raise ValueError when the request can never run here."""
        limit, num_prompt_tokens = self.capacity.max_model_len, len(request.prompt_token_ids)
        if request.request_id in self._live or any(request.request_id == delta.request_id for delta in self._outbox):
            raise ValueError(f"request_id {request.request_id!r} is already in use: wait for its end or choose another")
        if not num_prompt_tokens:
            raise ValueError("prompt_token_ids is empty: give at least one token, such as the model's begin token")
        if num_prompt_tokens >= limit:
            raise ValueError(
                f"the prompt has {num_prompt_tokens} tokens, model.max_model_len {limit} leaves no room for output: "
                f"shorten the prompt to {limit - 1} tokens or raise model.max_model_len"
            )
        if request.sampling.n != 1:
            raise ValueError(
                f"sampling.n is {request.sampling.n}: the engine takes one sequence per request, submit n of them"
            )
        max_tokens = request.sampling.max_tokens
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"sampling.max_tokens is {max_tokens}: ask for at least 1 token")
        for name, ids in (
            ("prompt_token_ids", request.prompt_token_ids),
            ("emitted_token_ids", request.emitted_token_ids),
        ):
            if ids and not (min(ids) >= 0 and max(ids) < self.capacity.vocab_size):
                wrong = next(i for i, token in enumerate(ids) if not 0 <= token < self.capacity.vocab_size)
                raise ValueError(
                    f"{name}[{wrong}] is {ids[wrong]}: the vocabulary has the ids 0 to {self.capacity.vocab_size - 1}"
                )
        most = limit if max_tokens is None else min(limit, num_prompt_tokens + max_tokens)
        check_fits_alone(self.scheduler.tables, num_prompt_tokens, most)

    def _check_wait(self) -> None:
        """Raise QueueFull when a new request would wait for longer than it may."""
        limit_s = self.config.scheduler.max_queue_wait_s
        if limit_s is None:
            return
        expected_s = self._queue_wait.expected_s()
        if expected_s > limit_s:
            raise QueueFull(
                f"a request would wait {expected_s:.3f} s for its turn, the limit is {limit_s:g} s "
                "(scheduler.max_queue_wait_s): come back later, or raise it",
                expected_s - limit_s,
            )

    def _retry_after_s(self) -> float:
        """About how long until one waiting request has its turn."""
        per_request = (self.clock.monotonic() - self._started) / max(1, self._num_finished)
        return min(max(per_request, MIN_RETRY_S), MAX_RETRY_S)

    def abort(self, request_ids: list[str], *, silent: bool = False) -> None:
        """End requests with finish_reason "abort" in the next `step`; unknown ids are no error.

        silent: nobody reads their deltas any more; there is none, and the ids are free at once.
        """
        for request_id in request_ids:
            seq = self._live.pop(request_id, None)
            if seq is not None:
                self.scheduler.finish(seq)
                if not silent:
                    self._outbox.append(seq.take_delta("abort"))

    def step(self) -> list[OutputDelta]:
        """Launch what can run, wait for the oldest result, return what it gave.

        Blocks for at most launcher.step_timeout_s.
        """
        started, executor_s = self.clock.monotonic(), self._executor_s
        if self.failure is None:
            try:
                self._advance()
            except Exception as error:  # noqa: BLE001 -- whatever it is, no stream may end in silence
                self.fail(error)
        deltas, self._outbox = self._outbox, []
        self._engine_s += self.clock.monotonic() - started - (self._executor_s - executor_s)
        return deltas

    def _advance(self) -> None:
        self._expire()
        while len(self._handles) < self.capacity.most_launched:
            plan = self.scheduler.schedule()
            if plan is None:
                break
            launched = self.clock.monotonic()
            handle = self.executor.launch(plan)
            self._handles.append((handle, launched))
            self._executor_s += self.clock.monotonic() - launched
        if not self._handles:
            assert not self._live, "requests are left and none of them can run"
            return
        handle, launched = self._handles.popleft()
        asked = self.clock.monotonic()
        result = self.executor.result(handle, self.config.launcher.step_timeout_s)
        now = self.clock.monotonic()
        self._executor_s += now - asked
        for timing in result.timings:
            self._forward_s += timing.forward_s
            self._wait_s += timing.wait_s
            self._sample_s += timing.sample_s
        seconds, self._last_result = now - max(launched, self._last_result), now
        self._queue_wait.observe(seconds)
        tell_joined = now - self._told_joined >= JOINED_S
        if tell_joined:
            self._told_joined = now
        for delta in self.scheduler.update(result, seconds, tell_joined=tell_joined):
            if delta.finish_reason is not None:
                del self._live[delta.request_id]
                self._num_finished += 1
            self._outbox.append(delta)

    def _expire(self) -> None:
        """Abort what has passed its deadline. Looks at the requests only when the earliest deadline has come."""
        now = self.clock.time()
        if now < self._next_deadline:
            return
        deadlines = {seq.request_id: seq.request.deadline_s for seq in self._live.values()}
        self.abort([request_id for request_id, moment in deadlines.items() if moment is not None and moment <= now])
        later = (moment for moment in deadlines.values() if moment is not None and moment > now)
        self._next_deadline = min(later, default=float("inf"))

    def check_executor(self) -> None:
        """Fail when a rank is known to have ended: call it now and then while there is no work."""
        if self.failure is None:
            try:
                self.executor.health()
            except ExecutorFailed as error:
                self.fail(error)

    def fail(self, error: Exception) -> None:
        """End every live request with "error" and accept no more. The first cause is kept."""
        if self.failure is not None:
            return
        named = isinstance(error, ExecutorFailed | EngineError)
        self.failure = EngineError(str(error) if named else f"the engine failed: {type(error).__name__}: {error}")
        self.failure.__cause__ = error
        for seq in self._live.values():
            self._outbox.append(seq.take_delta("error", str(self.failure)))
        self._live.clear()
        self._handles.clear()

    def tell_cache(self) -> None:
        """Keep note of what the prefix cache holds, all of it first, for `cache_changes`: of the first group that sees
        all positions. Call for each new listener.
        """
        windows, pools = self.scheduler.tables.windows, self.scheduler.tables.pools
        self._told_pool = pools[windows.index(None) if None in windows else 0]
        self._told_pool.log = CacheLog(anew=bool(self._told_pool.keys))

    def cache_changes(self) -> CacheChanges | None:
        """What the prefix cache gained and lost since the last call; None when nothing, or when not asked to tell."""
        pool = self._told_pool
        return None if pool is None or pool.log is None else pool.log.take(pool.keys)

    def stats(self) -> EngineStats:
        """Counters and gauges.

        prompt_tokens counts started requests once; the cache's tokens likewise, without preempted restarts.
        """
        scheduler, pools = self.scheduler, self.scheduler.tables.pools
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            free_blocks=[pool.num_free for pool in pools],
            cached_blocks=[pool.num_cached for pool in pools],
            referenced_blocks=[pool.num_referenced for pool in pools],
            total_blocks=[pool.num_blocks for pool in pools],
            steps=scheduler.num_steps,
            prompt_tokens=scheduler.num_prompt_tokens,
            generated_tokens=scheduler.num_generated_tokens,
            cache_query_tokens=scheduler.num_queried_tokens,
            cache_hit_tokens=scheduler.num_hit_tokens,
            preemptions=scheduler.num_preemptions,
            engine_s=self._engine_s,
            executor_s=self._executor_s,
            forward_s=self._forward_s,
            wait_s=self._wait_s,
            sample_s=self._sample_s,
        )

    def check_integrity(self) -> None:
        """Assert the invariants of scheduler, tables and pools.

        Call between steps; takes time in the size of the cache.
        """
        self.scheduler.check_integrity()
        live = self.scheduler.waiting + self.scheduler.running
        assert {seq.request_id: seq for seq in live} == self._live, "live requests and queues differ"
        assert len(self._handles) == len(self.scheduler.launched), "handles and launched plans differ"
