"""ReplicaSlot: the place of one replica in a controller; keeps a replica alive there, life after life.

    bring_up -> supervise: ready ... failed -> stop what is left -> back off -> bring up again -> ...

The first death is mended at once. Lives that come to nothing (never ready, or gone before they served for a while) wait
longer each time, and after `max_restarts` of them in a row the place is given up; the first cause of the series is
what is told.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable

import msgspec

from shoal.engine.client import EngineError
from shoal.launcher.controller_status import FailureRecord, ReplicaState, ReplicaStatus
from shoal.launcher.replica import Progress, ReplicaFactory, ReplicaHandle
from shoal.launcher.replica_messages import Ready

KEPT_FAILURES = 16
STATS_TIMEOUT_S = 1.0
STOP_TIMEOUT_S = 30.0

logger = logging.getLogger("shoal")


class RestartPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """When a replica is built again. max_restarts: fruitless lives in a row before it is given up; 0 never rebuilds.

    first_s: the wait after the second fruitless life, doubled for each further one up to longest_s. lasting_s: a life
    this long was not fruitless, nor one that gave tokens.
    """

    max_restarts: int = 5
    first_s: float = 0.5
    longest_s: float = 30.0
    lasting_s: float = 10.0

    def delay_s(self, fruitless: int) -> float:
        """How long to wait after this many fruitless lives in a row."""
        return 0.0 if fruitless <= 1 else min(self.longest_s, self.first_s * 2.0 ** (fruitless - 2))


class ReplicaSlot:
    """One replica's place. Used from one event loop.

    work: outstanding tokens of the requests it was given; in_flight: how many they are; unanswered: of how many of them
    it has said nothing yet (the controller counts all three).
    emptied: set when the last of them has left. served: its present life has given a token.
    """

    def __init__(
        self,
        number: int,
        factory: ReplicaFactory,
        policy: RestartPolicy,
        start_timeout_s: float,
        on_change: "Callable[[ReplicaSlot], None]",
    ) -> None:
        """on_change: called whenever its state changed."""
        self.number, self._factory, self._policy = number, factory, policy
        self._start_timeout_s, self._on_change = start_timeout_s, on_change
        self.state: ReplicaState = "starting"
        self.handle: ReplicaHandle | None = None
        self.capacity: Ready | None = None
        self.work = self.in_flight = self.unanswered = 0
        self._full_until = 0.0
        self.emptied = asyncio.Event()
        self.served = False
        self.life = 0
        self.failures: deque[FailureRecord] = deque(maxlen=KEPT_FAILURES)
        self.first_failure: FailureRecord | None = None
        self._fruitless = 0
        self._ready_since: float | None = None
        self._next_start: float | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether it takes new requests."""
        return self.state == "ready"

    @property
    def serves(self) -> bool:
        """Whether its replica is there: ready, or draining."""
        return self.state in ("ready", "draining")

    @property
    def may_serve(self) -> bool:
        """Whether it takes requests now or may again."""
        return self.state in ("starting", "ready", "backing off")

    @property
    def full_for_s(self) -> float:
        """Seconds until it is to be asked again, after it said that it is full; 0 when it may be asked."""
        return max(0.0, self._full_until - time.monotonic())

    @property
    def says_full(self) -> bool:
        """Whether it has just said that it is full."""
        return self._full_until > time.monotonic()

    def is_full(self, seconds: float) -> None:
        """It said so: it is not asked for so long, or until `has_place`."""
        self._full_until = time.monotonic() + seconds

    def has_place(self) -> None:
        """One of its requests has ended."""
        self._full_until = 0.0

    async def bring_up(self, on_progress: Progress | None = None) -> Ready:
        """Start a replica and wait until it is ready. Raises ValueError, EngineError, after ending what was started."""
        self._change("starting")
        try:
            self.handle = await self._factory(self.number)
            await self.handle.start()
            self.capacity = await self.handle.ready(self._start_timeout_s, on_progress)
        except BaseException:
            await self._stop_handle()
            raise
        self._ready_since, self._next_start = time.monotonic(), None
        self._change("ready")
        return self.capacity

    def supervise(self) -> None:
        """Watch the replica that was brought up, and keep one there. Call once."""
        self._task = asyncio.get_running_loop().create_task(self._supervise(), name=f"replica {self.number}")

    def start_supervised(self, on_progress: Progress | None = None) -> None:
        """Bring the first replica up and keep one there, in the background; a failed start counts as a failed life."""
        self._task = asyncio.get_running_loop().create_task(
            self._bring_up_and_supervise(on_progress), name=f"replica {self.number}"
        )

    async def _bring_up_and_supervise(self, on_progress: Progress | None) -> None:
        try:
            await self.bring_up(on_progress)
        except (ValueError, EngineError) as error:
            self._note(error)
            if not await self._rebuild():
                return
        await self._supervise()

    async def _supervise(self) -> None:
        while True:
            assert self.handle is not None
            error = await self.handle.failed()
            self._note(error)
            await self._stop_handle()
            if not await self._rebuild():
                return

    async def _rebuild(self) -> bool:
        """Bring up a replica again, however many attempts it takes; False when there is to be none."""
        while self.state == "backing off":
            delay = self._policy.delay_s(self._fruitless)
            self._next_start = time.monotonic() + delay
            await asyncio.sleep(delay)
            try:
                await self.bring_up()
            except (ValueError, EngineError) as error:
                self._note(error)
            else:
                logger.warning("replica %d is ready again (life %d)", self.number, self.life)
                return True
        return False

    def _note(self, error: Exception) -> None:
        """Record the end of a life, and say what comes after it."""
        lived_s = None if self._ready_since is None else time.monotonic() - self._ready_since
        record = FailureRecord(moment=time.time(), life=self.life, cause=str(error), lived_s=lived_s)
        fruitful = lived_s is not None and (self.served or lived_s >= self._policy.lasting_s)
        if fruitful or self.first_failure is None:
            self.first_failure = record
        self._fruitless = 1 if fruitful else self._fruitless + 1
        self.failures.append(record)
        self.life += 1
        self._ready_since, self.served = None, False
        logger.warning("replica %d failed (life %d): %s", self.number, record.life, record.cause)
        if self.state == "draining":
            self._change("stopped")
        elif self._fruitless > self._policy.max_restarts:
            self._change("given up")
            logger.error("replica %d is given up: %s", self.number, self.reason)
        else:
            self._change("backing off")

    @property
    def reason(self) -> str:
        """Why it does not serve: the first cause of its last failures first."""
        if self.first_failure is None:
            return f"replica {self.number} is {self.state}"
        first, last = self.first_failure.cause, self.failures[-1].cause
        if self._fruitless < 2:
            return first
        return f"{first}\n({self._fruitless} failures in a row" + (f"; the last: {last})" if last != first else ")")

    def lost(self, handle: ReplicaHandle) -> None:
        """Somebody found this replica dead: it gets nothing more, before its supervision has taken note."""
        if handle is self.handle and self.state == "ready":
            self._change("backing off")

    def drain(self) -> None:
        """Take no new requests from now on."""
        if self.may_serve:
            self._change("draining")

    async def stop(self) -> None:
        """End the replica and its supervision. Idempotent."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await self._stop_handle()
        if self.state != "given up":
            self._change("stopped")

    async def _stop_handle(self) -> None:
        handle, self.handle = self.handle, None
        if handle is None:
            return
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await asyncio.shield(handle.stop())
        except (EngineError, TimeoutError, OSError) as error:
            logger.warning("replica %d did not stop: %s: %s", self.number, type(error).__name__, error)

    def _change(self, state: ReplicaState) -> None:
        self.state = state
        self._on_change(self)

    async def status(self) -> ReplicaStatus:
        """What there is to say, with the engine's counters when it answers within STATS_TIMEOUT_S."""
        now, handle, stats = time.monotonic(), self.handle, None
        if self.serves and handle is not None:
            try:
                async with asyncio.timeout(STATS_TIMEOUT_S):
                    (stats,) = await handle.client.stats()
            except (EngineError, TimeoutError):
                pass  # it is about to be found dead, or deep in a step
        return ReplicaStatus(
            number=self.number,
            state=self.state,
            live=self.state not in ("given up", "stopped"),
            ready=self.ready,
            busy=self.in_flight > 0,
            restarts=self.life,
            ready_for_s=None if self._ready_since is None else now - self._ready_since,
            in_flight=self.in_flight,
            outstanding_tokens=self.work,
            ranks=[] if handle is None else handle.places(),
            health=[] if handle is None else handle.rank_health(),
            failures=list(self.failures),
            first_failure=self.first_failure,
            next_start_in_s=None if self._next_start is None else max(0.0, self._next_start - now),
            stats=stats,
        )
