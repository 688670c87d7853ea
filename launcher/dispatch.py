"""Dispatch: takes every accepted request to a replica, and to another when that one dies, is full or goes away.

One generator per request (`stream`) places it, follows its replica's deltas and, when those end without the request's
end, places it again with what it has emitted.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import cast

import msgspec

from shoal.engine.client import EngineError, QueueFull
from shoal.engine.messages import OutputDelta, Request
from shoal.launcher.journal import Journal
from shoal.launcher.rate import Rate
from shoal.launcher.replica import ReplicaHandle
from shoal.launcher.replica_slot import ReplicaSlot
from shoal.launcher.request_ledger import Entry, RequestLedger
from shoal.launcher.routing import Routing
from shoal.launcher.waiting_line import WaitingLine

MAX_FRUITLESS = 5
SUSPECT_AFTER = 2  # fruitless deaths: whatever kills replicas is found by trying the suspects one at a time
MIN_RETRY_S, MAX_RETRY_S = 0.1, 60.0
FULL_PAUSE_S = 0.1


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """max_model_len: bounds the expected output of a request without max_tokens. max_in_flight: requests a replica may
    have at once, running and queued. max_waiting: accepted requests no replica works on. Beyond these, new ones are
    refused. bounded_wait: replicas refuse what would wait too long for its turn; then none waits in front of them, and
    a replica is asked about at most max_unanswered at a time.
    """

    max_model_len: int = 1 << 31
    max_in_flight: int = 8192 + 256
    max_waiting: int = 8192
    bounded_wait: bool = False
    max_unanswered: int = 256


class Dispatch:
    """The requests of a controller. slots: its replicas by number, as they are. seed: of the seeds drawn for requests
    without one. journal: keeps what is accepted and emitted, before it is acknowledged and delivered.
    """

    def __init__(
        self,
        slots: Mapping[int, ReplicaSlot],
        routing: Routing,
        limits: Limits,
        seed: int | None = None,
        journal: Journal | None = None,
    ) -> None:
        self._slots, self.routing, self.limits, self.journal = slots, routing, limits, journal
        self.ledger, self.line, self.suspects = RequestLedger(seed), WaitingLine(), WaitingLine()
        self._on_trial: Entry | None = None
        self.finished, self.tokens = Rate(), Rate()
        self.refused = self.resumed = self.lost = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self.draining = False
        self.closed: str | None = None

    def _accept(self, request: Request, on_accepted: Callable[[], None] | None) -> Entry:
        """Enter a request into the ledger, and the journal. Raises QueueFull, EngineError, ValueError."""
        self.check()
        if self.draining:
            raise EngineError("the engine is draining and takes no new requests")
        kept = self.journal is not None and request.request_id in self.journal.live  # an earlier controller accepted it
        if not kept:
            self._check_room()
        entry = self.ledger.add(request)
        entry.on_accepted = on_accepted
        try:
            if self.journal is not None:
                self.journal.accepted(entry.request)
        except OSError as error:
            self.ledger.remove(entry)
            raise EngineError(f"the request cannot be kept, and is not accepted: {error}") from error
        except BaseException:
            self.ledger.remove(entry)
            raise
        self.idle.clear()
        if kept:
            entry.accept()
        return entry

    def _check_room(self) -> None:
        """Raise QueueFull, without asking a replica, when a new request is to be refused."""
        ready = [slot for slot in self._slots.values() if slot.ready]
        taking = any(self._has_room(slot) for slot in ready)
        if self.limits.bounded_wait:
            refused, setting = not taking or bool(self.num_waiting), "scheduler.max_queue_wait_s"
        else:
            refused = (bool(ready) and not taking) or self.num_waiting >= self.limits.max_waiting
            setting = "scheduler.max_queued_requests"
        if refused:
            self.refused += 1
            raise QueueFull(
                f"{len(self.ledger)} requests are under way or wait already ({setting}): come back later, or raise it",
                self._retry_after_s(),
            )

    def _has_room(self, slot: ReplicaSlot) -> bool:
        """Whether a ready replica is to be asked: it has places, and has not just said that it is full."""
        if slot.in_flight >= self.limits.max_in_flight or slot.says_full:
            return False
        return not self.limits.bounded_wait or slot.unanswered < self.limits.max_unanswered

    @property
    def num_waiting(self) -> int:
        """Accepted requests that no replica works on."""
        return len(self.line) + len(self.suspects)

    def wake(self) -> None:
        """Something changed: the first in line may look whether there is a place."""
        self.line.wake()
        self.suspects.wake()

    def wake_all(self) -> None:
        """Something changed that concerns everybody who waits."""
        self.line.wake_all()
        self.suspects.wake_all()

    def check(self) -> None:
        """Raises EngineError when no replica serves or ever will again."""
        if self.closed is not None:
            raise EngineError(self.closed)
        if not any(slot.may_serve for slot in self._slots.values()):
            failed = [slot for slot in self._slots.values() if slot.first_failure is not None]
            failed.sort(key=lambda slot: slot.first_failure.moment)  # type: ignore[union-attr]
            reason = failed[0].reason if failed else "all were taken away"
            raise EngineError(f"no replica can serve any more; the first cause: {reason}")

    def accepted(self, request_id: str) -> None:
        """A replica says that it accepts a request it was given."""
        entry = self.ledger.get(request_id)
        if entry is not None and entry.slot is not None:
            self._answered(entry.slot, entry)
            entry.accept()

    async def stream(
        self, request: Request, on_accepted: Callable[[], None] | None = None
    ) -> AsyncGenerator[OutputDelta]:
        """Accept a request, on the first iteration, and give its deltas to its end. Raises QueueFull, EngineError,
        ValueError then; later there are only deltas. on_accepted: called once, when it will not be refused any more,
        at the latest before its first token.
        """
        entry = self._accept(request, on_accepted)
        try:
            while True:
                try:
                    slot = await self._placed(entry)
                except EngineError as error:
                    if not entry.firm:
                        raise
                    self.lost += 1
                    yield entry.last_delta("error", str(error))
                    return
                if slot is None:
                    yield entry.last_delta("abort")
                    return
                async with aclosing(self._follow(slot, entry)) as deltas:
                    async for delta in deltas:
                        yield delta
                        if delta.finish_reason is not None:
                            return
        finally:
            self.ledger.remove(entry)
            if self.journal is not None:
                self.journal.ended(entry.request_id)
            self.line.leave(entry)
            self.suspects.leave(entry)
            self._end_trial(entry)
            self.finished.add(1)
            if not len(self.ledger):
                self.idle.set()
            self.wake()

    def _retry_after_s(self) -> float:
        """About how long until a request ends and leaves its place."""
        per_s = self.finished.per_s()
        return MAX_RETRY_S if per_s <= 0 else min(max(1.0 / per_s, MIN_RETRY_S), MAX_RETRY_S)

    async def _placed(self, entry: Entry) -> ReplicaSlot | None:
        """A replica for the request, as soon as one has room; None when it is aborted, or its deadline passes, first.

        Raises EngineError when no replica can serve any more, QueueFull when the request may not wait here.
        """
        while True:
            self.check()
            if entry.aborted or entry.seconds_left == 0.0:
                return None
            if all(number in entry.refused_by for number, slot in self._slots.items() if slot.may_serve):
                entry.refused_by.clear()
            suspect = entry.fruitless >= SUSPECT_AFTER
            line = self.suspects if suspect else self.line
            if line.may_go(entry) and not (suspect and self._on_trial is not None):
                loads = {
                    number: slot.work
                    for number, slot in self._slots.items()
                    if slot.ready and self._has_room(slot) and number not in entry.refused_by
                }
                if loads:
                    line.leave(entry)
                    self._on_trial = entry if suspect else self._on_trial
                    return self._slots[self.routing.rank(entry.request, loads)[0]]
            if self.limits.bounded_wait and not entry.firm:
                self._check_room()  # what was there a moment ago may be taken by another
            entry.accept()
            waits = [entry.seconds_left, *(slot.full_for_s for slot in self._slots.values() if slot.says_full)]
            await line.wait(entry, min((each for each in waits if each is not None), default=None))
            entry.refused_by.clear()

    async def _follow(self, slot: ReplicaSlot, entry: Entry) -> AsyncGenerator[OutputDelta]:
        """The request's deltas from one replica, counted as its work while it lasts. Ends without a last delta when the
        request must go on elsewhere.
        """
        handle = slot.handle
        assert handle is not None, "a ready slot has a replica"
        self._enter(slot, entry)
        try:
            async with aclosing(cast(AsyncGenerator[OutputDelta], handle.submit(entry.resumed()))) as stream:
                async for delta in stream:
                    if delta.finish_reason == "error" and await self._is_dead(slot, handle):
                        if self._survives(entry):
                            return
                        yield self._poisonous(entry, delta)
                    elif delta.finish_reason == "abort" and entry.moving and not entry.aborted:
                        self.resumed += 1
                        return
                    else:
                        self._count(slot, entry, delta)
                        delta = entry.take(delta)
                        if self.journal is not None:
                            self.journal.emitted(entry.request_id, delta.start, delta.token_ids, delta.logprobs)
                        yield delta
        except QueueFull as error:
            self._refused_by(slot, entry, error)
        except ValueError as error:  # a rebuilt replica may have less memory than the first had
            if not entry.firm:
                raise
            self.lost += 1
            yield entry.last_delta("error", f"the request cannot go on at replica {slot.number}: {error}")
        except EngineError:
            if not await self._is_dead(slot, handle):
                raise
            entry.accept()
        finally:
            self._leave(slot, entry)

    def _enter(self, slot: ReplicaSlot, entry: Entry) -> None:
        prompt, room = len(entry.request.prompt_token_ids), self.limits.max_model_len
        most = entry.request.sampling.max_tokens
        expected = max(1, room - prompt) if most is None else min(max(1, room - prompt), most)
        entry.slot, entry.moving, entry.started_here, entry.answered_here = slot, False, False, False
        slot.unanswered += 1
        entry.work = prompt + max(expected, len(entry.emitted))
        slot.in_flight += 1
        slot.work += entry.work
        self.routing.sent(entry.request, slot.number)
        self.wake()

    def _count(self, slot: ReplicaSlot, entry: Entry, delta: OutputDelta) -> None:
        """Take what a delta says was computed off the replica's work."""
        done = len(delta.token_ids)
        self.tokens.add(done)
        if not entry.started_here:
            entry.started_here = slot.served = True
            self._answered(slot, entry)
            entry.accept()
            entry.refused_by.clear()
            self._end_trial(entry)
            done += len(entry.request.prompt_token_ids) + len(entry.emitted)
            self.routing.arrived(entry.request, slot.number)
        done = min(done, entry.work)
        entry.work -= done
        slot.work -= done

    def _answered(self, slot: ReplicaSlot, entry: Entry) -> None:
        """The replica has said something of the request, or will not."""
        if not entry.answered_here:
            entry.answered_here = True
            slot.unanswered -= 1
            self.wake()

    def _leave(self, slot: ReplicaSlot, entry: Entry) -> None:
        self._answered(slot, entry)
        slot.in_flight -= 1
        slot.work -= entry.work
        if entry.started_here:
            slot.has_place()
        else:
            self.routing.arrived(entry.request, slot.number)
        entry.slot, entry.work = None, 0
        self._end_trial(entry)
        if not slot.in_flight:
            slot.emptied.set()
        self.wake()

    def _end_trial(self, entry: Entry) -> None:
        """The suspect has given a token, or died: the next one may try."""
        if self._on_trial is entry:
            self._on_trial = None
            self.suspects.wake()

    def _survives(self, entry: Entry) -> bool:
        """Note that the request's replica died; False when that happens to it time and again, so that it may be why."""
        entry.accept()
        self.resumed += 1
        if not entry.moving:
            entry.fruitless += 1
        return entry.fruitless < MAX_FRUITLESS

    def _poisonous(self, entry: Entry, delta: OutputDelta) -> OutputDelta:
        """The end of a request under which replica after replica dies."""
        self.lost += 1
        text = f"{entry.fruitless} replicas in a row died under this request before its next token; the last: "
        return entry.last_delta("error", text + (delta.error or "no reason was given"))

    def _refused_by(self, slot: ReplicaSlot, entry: Entry, error: QueueFull) -> None:
        """A replica is full by its own account: others may have room. If none has, a new request is refused, one that
        has been accepted waits until a place frees, or a little. The replica is not asked again meanwhile.
        """
        slot.is_full(min(error.retry_after_s, FULL_PAUSE_S))
        if not entry.firm and not any(other.ready and self._has_room(other) for other in self._slots.values()):
            self.refused += 1
            raise error

    @staticmethod
    async def _is_dead(slot: ReplicaSlot, handle: ReplicaHandle) -> bool:
        """Whether the replica cannot serve any more; its slot is told then."""
        try:
            await handle.health()
        except EngineError:
            slot.lost(handle)
            return True
        return False

    async def move(self, entries: list[Entry]) -> None:
        """Have requests go on elsewhere: their replica ends them, and their streams find another place."""
        for entry in entries:
            entry.moving = True
        await self._abort_where_they_are(entries)

    async def move_away(self, request_ids: list[str]) -> int:
        """Have requests go on at another replica than their own, if one is ready; returns how many do."""
        ready = {number for number, slot in self._slots.items() if slot.ready}
        moving = []
        for request_id in request_ids:
            entry = self.ledger.get(request_id)
            if entry is not None and entry.slot is not None and ready - {entry.slot.number}:
                entry.refused_by.add(entry.slot.number)
                moving.append(entry)
        await self.move(moving)
        return len(moving)

    async def abort(self, request_ids: list[str]) -> None:
        """End requests wherever they are; unknown or finished ids are no error."""
        entries = [entry for request_id in request_ids if (entry := self.ledger.get(request_id)) is not None]
        for entry in entries:
            entry.aborted = True
            self.line.wake_one(entry)
        await self._abort_where_they_are(entries)

    @staticmethod
    async def _abort_where_they_are(entries: list[Entry]) -> None:
        by_handle: dict[ReplicaHandle, list[str]] = {}
        for entry in entries:
            if entry.slot is not None and entry.slot.handle is not None:
                by_handle.setdefault(entry.slot.handle, []).append(entry.request_id)
        for handle, request_ids in by_handle.items():
            try:
                await handle.client.abort(request_ids)
            except EngineError:
                pass  # its death ends them
