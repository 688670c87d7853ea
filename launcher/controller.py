"""Controller: one EngineClient over the replicas of a model. It owns them: routes to them, watches and rebuilds them.

No accepted request is lost with a replica: its streams go on elsewhere, or on the rebuilt one, from the tokens already
emitted; the client sees one stream without a gap or a repeat. docs/failures.md says what may die.

    controller = Controller(factory, num_replicas=2, options=ControllerOptions(...))
    await controller.start()         # raises the first cause when a replica does not come up
    async for delta in controller.submit(request): ...
    await controller.scale(3); await controller.status(); await controller.close()
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from functools import partial

import msgspec

from shoal.engine.cache_log import CacheChanges, split_keys
from shoal.engine.client import EngineClient, EngineError
from shoal.engine.messages import EngineStats, OutputDelta, Request
from shoal.launcher.controller_status import ControllerStatus, ReplicaState
from shoal.launcher.dispatch import Dispatch, Limits
from shoal.launcher.journal import Journal
from shoal.launcher.replica import Progress, ReplicaFactory
from shoal.launcher.replica_messages import Ready
from shoal.launcher.replica_slot import ReplicaSlot, RestartPolicy
from shoal.launcher.routing import LeastLoaded, Routing


class ControllerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """limits: bounds of the queues. restarts: when a replica is built again. drain_timeout_s: what a replica that is
    taken away gets to finish what runs on it. seed: of the seeds drawn for requests without one.
    """

    limits: Limits = Limits()
    restarts: RestartPolicy = RestartPolicy()
    start_timeout_s: float = 600.0
    drain_timeout_s: float = 30.0
    seed: int | None = None


class Controller(EngineClient):
    """Used from one event loop."""

    def __init__(
        self,
        factory: ReplicaFactory,
        num_replicas: int,
        options: ControllerOptions,
        routing: Routing | None = None,
        on_close: Callable[[], Awaitable[None]] | None = None,
        journal: Journal | None = None,
    ) -> None:
        """factory: makes a handle for each life of each replica. routing: LeastLoaded when None. on_close: called once,
        after all replicas were stopped. journal: for a controller whose successor is to go on with its requests; the
        caller closes it.
        """
        self._factory, self.options, self._on_close = factory, options, on_close
        self._routing = LeastLoaded() if routing is None else routing
        self._slots: dict[int, ReplicaSlot] = {number: self._slot(number) for number in range(num_replicas)}
        self._dispatch = Dispatch(self._slots, self._routing, options.limits, options.seed, journal)
        self._scaling, self._changed = asyncio.Lock(), asyncio.Event()
        self._started = time.monotonic()

    def _slot(self, number: int) -> ReplicaSlot:
        options = self.options
        return ReplicaSlot(number, self._factory, options.restarts, options.start_timeout_s, self._slot_changed)

    def _slot_changed(self, slot: ReplicaSlot) -> None:
        self._changed.set()
        if not slot.serves:
            self._routing.forget(slot.number)
        if slot.ready and slot.handle is not None:
            slot.handle.watch_cache(partial(self._cache_changed, slot.number))
            slot.handle.watch_accepted(self._dispatch.accepted)
        if slot.may_serve:
            self._dispatch.wake()
        else:
            self._dispatch.wake_all()

    def _cache_changed(self, number: int, changes: CacheChanges) -> None:
        stored, removed = split_keys(changes.stored), split_keys(changes.removed)
        self._routing.cache_changed(number, stored, removed, anew=changes.anew)

    async def start(self, on_progress: Progress | None = None) -> list[Ready]:
        """Bring the replicas up; what each said, by number. Raises ValueError or EngineError, the first cause, after
        stopping every replica.
        """
        slots = list(self._slots.values())
        tasks = [asyncio.ensure_future(slot.bring_up(on_progress)) for slot in slots]
        try:
            readies = await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.close()
            raise
        for slot in slots:
            slot.supervise()
        return readies

    async def take_over(self, found: Collection[int], on_progress: Progress | None = None) -> Ready:
        """Bring up those that an earlier controller left, then the others: what fails of one, also of one that was
        found and has gone since, is its own alone. Returns what the first that serves said; the rest comes up in the
        background. Raises EngineError, the first cause, when none will, after stopping every replica.
        """
        for number in found:
            self._slots[number].start_supervised(on_progress)
        try:
            first = await self._first_ready([self._slots[number] for number in found], lives=1)
            for number, slot in self._slots.items():
                if number not in found:
                    slot.start_supervised(on_progress)
            first = first or await self._first_ready(list(self._slots.values()))
            if first is None:
                self._dispatch.check()
                raise EngineError("no replica serves")
            return first
        except BaseException:
            await self.close()
            raise

    async def _first_ready(self, slots: Sequence[ReplicaSlot], lives: int = 1 << 31) -> Ready | None:
        """What the first of these that serves said; None when none will in its first so many lives."""
        while any(slot.may_serve and slot.life < lives for slot in slots):
            for slot in slots:
                if slot.ready:
                    return slot.capacity
            self._changed.clear()
            await self._changed.wait()
        return None

    async def scale(self, num_replicas: int) -> None:
        """Have this many replicas. New ones come up in the background. Of those there are, the highest numbers go: they
        take nothing new, what waits on them goes elsewhere, what runs has drain_timeout_s to finish and goes elsewhere
        then. Returns when the last of them has stopped. Raises ValueError for less than one.
        """
        if num_replicas < 1:
            raise ValueError(f"replicas = {num_replicas}: keep at least 1, or take the model down")
        async with self._scaling:
            leaving = [self._slots[number] for number in sorted(self._slots) if number >= num_replicas]
            for number in range(num_replicas):
                if number not in self._slots:
                    slot = self._slots[number] = self._slot(number)
                    slot.start_supervised()
            await asyncio.gather(*(self._retire(slot) for slot in leaving))

    async def _retire(self, slot: ReplicaSlot) -> None:
        """Take a replica away without losing what it was given."""
        slot.drain()
        ledger, dispatch = self._dispatch.ledger, self._dispatch
        await dispatch.move([entry for entry in ledger if entry.slot is slot and not entry.started_here])
        if slot.in_flight:
            slot.emptied.clear()
            try:
                async with asyncio.timeout(self.options.drain_timeout_s):
                    await slot.emptied.wait()
            except TimeoutError:
                await dispatch.move([entry for entry in ledger if entry.slot is slot])
        await slot.stop()  # streams that are still there end, and go on elsewhere
        del self._slots[slot.number]

    def submit(self, request: Request, on_accepted: Callable[[], None] | None = None) -> AsyncIterator[OutputDelta]:
        """Accept a request and stream its deltas, whatever happens to replicas meanwhile; see EngineClient.
        on_accepted: called once, when the journal holds it and it will not be refused any more.
        """
        return self._dispatch.stream(request, on_accepted)

    async def abort(self, request_ids: list[str]) -> None:
        """End requests wherever they are; unknown or finished ids are no error."""
        await self._dispatch.abort(request_ids)

    def progress(self) -> list[tuple[str, int, int]]:
        """Of every request a replica works on: its id, the replica's number, the tokens it has emitted."""
        return [(e.request_id, e.slot.number, len(e.emitted)) for e in self._dispatch.ledger if e.slot is not None]

    def state_of(self, number: int) -> tuple[ReplicaState, int]:
        """A replica's state, and which life it is in. Raises KeyError for one there is not."""
        slot = self._slots[number]
        return slot.state, slot.life

    async def signal(self, number: int, rank: int | None, which: int) -> None:
        """Send a signal to a process of a replica (rank None: its engine's), for fault drills. Raises EngineError."""
        handle = self._slots[number].handle
        if handle is None:
            raise EngineError(f"replica {number} is {self._slots[number].state}")
        await handle.signal(rank, which)

    async def move_away(self, request_ids: list[str]) -> int:
        """Have requests go on at another replica than where they are, if there is one; returns how many do."""
        return await self._dispatch.move_away(request_ids)

    async def stats(self) -> list[EngineStats]:
        """One entry per replica that serves, by number; the counters of a rebuilt one begin anew. Raises EngineError
        when no replica can serve any more.
        """
        await self.health()
        found = []
        for _, slot in sorted(self._slots.items()):
            if slot.serves and slot.handle is not None:
                try:
                    found += await slot.handle.client.stats()
                except EngineError:
                    continue  # it has just died
        return found

    async def health(self) -> None:
        """Raises EngineError with the first cause when no replica serves or ever will again."""
        self._dispatch.check()

    async def status(self) -> ControllerStatus:
        """Everything there is to say."""
        dispatch = self._dispatch
        slots = [self._slots[number] for number in sorted(self._slots)]
        return ControllerStatus(
            replicas=list(await asyncio.gather(*(slot.status() for slot in slots))),
            draining=dispatch.draining,
            live_requests=len(dispatch.ledger),
            waiting=dispatch.num_waiting,
            accepted=dispatch.ledger.num_accepted,
            refused=dispatch.refused,
            resumed=dispatch.resumed,
            lost=dispatch.lost,
            tokens=dispatch.tokens.total,
            tokens_per_s=dispatch.tokens.per_s(),
            uptime_s=time.monotonic() - self._started,
        )

    async def drain(self, timeout_s: float) -> list[str]:
        """Refuse new requests, wait for the accepted ones; returns the ids that did not finish in time."""
        self._dispatch.draining = True
        try:
            async with asyncio.timeout(timeout_s):
                await self._dispatch.idle.wait()
        except TimeoutError:
            pass
        return sorted(entry.request_id for entry in self._dispatch.ledger)

    async def close(self) -> None:
        """Stop all replicas; what still runs ends with an error. Idempotent."""
        if self._dispatch.closed is not None:
            return
        self._dispatch.closed = "the engine was closed"
        self._dispatch.wake_all()
        try:
            await asyncio.gather(*(slot.stop() for slot in self._slots.values()))
        finally:
            if self._on_close is not None:
                await self._on_close()
