"""ControllerDoor: lets front ends in other processes use a controller, over the messages of a replica's engine.

To such a front end the controller is one big replica (`shoal.launcher.attached`). One that goes away ends its requests
at once, so their blocks are free again; so does one that is not heard for its lease, stopped or cut off: should it come
back, it connects again and gives its requests in anew. Acknowledged, the first word of a request unless it is Rejected,
is sent when the journal holds it; after the controller's own death front ends join what goes on already
(`shoal.launcher.orphans`).
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing

import msgspec

from shoal.engine.client import EngineError, QueueFull
from shoal.engine.messages import Abort, Drain, Drained, EngineStats, OutputDelta, Request, StatsQuery, Submit
from shoal.launcher.controller import Controller
from shoal.launcher.orphans import Orphans
from shoal.launcher.replica_messages import (
    TO_ENGINE,
    Acknowledged,
    Beat,
    Enter,
    Outputs,
    Ready,
    Rejected,
    Renew,
    Shutdown,
    ToEngine,
)
from shoal.parallel.control import ControlError, ControlTimeout
from shoal.parallel.control_async import AsyncChannel
from shoal.parallel.control_connect import HANDSHAKE_TIMEOUT_S, Listener, new_key

ACCEPT_SLICE_S = 0.5
BEAT_INTERVAL_S = 1.0
ENTER_TIMEOUT_S = 3.0
SECOND_LOOK_S = 0.05  # after a silence: it may have been this process that was held up

logger = logging.getLogger("shoal")


class ControllerDoor:
    """Listens from the start; `serve` until cancelled. address, key: what front ends connect with."""

    def __init__(self, controller: Controller, orphans: Orphans, ready: Ready, host: str, lease_s: float) -> None:
        """orphans: of the same controller. ready: told to every front end. host: the interface to listen on. lease_s:
        launcher's. Raises ControlError.
        """
        self._controller, self._orphans, self._ready, self.lease_s = controller, orphans, ready, lease_s
        self._listener, self.key = Listener.tcp(host), new_key()
        self._clients: set[asyncio.Task[None]] = set()
        self._places: dict[str, asyncio.Task[None]] = {}

    @property
    def address(self) -> str:
        """Where it listens."""
        return self._listener.address

    async def serve(self) -> None:
        """Let front ends in until cancelled; all are hung up on then."""
        try:
            while True:
                try:
                    channel = await asyncio.to_thread(
                        self._listener.accept, self.key, TO_ENGINE, "a front end", ACCEPT_SLICE_S, HANDSHAKE_TIMEOUT_S
                    )
                except ControlTimeout:
                    continue
                except OSError as error:  # no descriptors left, for one: there may be some a little later
                    logger.warning("a front end could not be let in: %s", error)
                    await asyncio.sleep(ACCEPT_SLICE_S)
                    continue
                task = asyncio.create_task(self._serve_one(await AsyncChannel.adopt(channel)))
                self._clients.add(task)
                task.add_done_callback(self._clients.discard)
        finally:
            self._listener.close()
            for task in self._clients:
                task.cancel()
            await asyncio.gather(*self._clients, return_exceptions=True)

    async def _serve_one(self, channel: "AsyncChannel[ToEngine]") -> None:
        """One connection of a front end; an older one of the same front end ends first, and with it what it had."""
        task = asyncio.current_task()
        assert task is not None
        name = ""
        try:
            enter = await channel.receive(ENTER_TIMEOUT_S)
            if not isinstance(enter, Enter):
                logger.warning("a front end began with a %s and is not let in", type(enter).__name__)
                return
            name = enter.front_end
            older, self._places[name] = self._places.get(name), task
            if older is not None:
                older.cancel()
                await asyncio.wait([older])
            await _Guest(self._controller, self._orphans, channel, name, self.lease_s).serve(self._ready)
        except ControlError as error:
            logger.info("a front end has left: %s", error)
        finally:
            channel.close()
            if self._places.get(name) is task:
                del self._places[name]


class _Guest:
    """One front end. Its request ids get its name as a prefix here: they are unique to it only."""

    def __init__(
        self,
        controller: Controller,
        orphans: Orphans,
        channel: "AsyncChannel[ToEngine]",
        front_end: str,
        lease_s: float,
    ) -> None:
        self._controller, self._orphans, self._channel, self._lease_s = controller, orphans, channel, lease_s
        self._prefix = f"{front_end}/"
        self._streams: dict[str, asyncio.Task[None]] = {}

    async def serve(self, ready: Ready) -> None:
        beat = asyncio.create_task(self._beat())
        try:
            await self._channel.send(ready)
            while True:
                try:
                    message = await self._channel.receive(self._lease_s)
                except ControlTimeout:
                    message = await self._channel.receive(SECOND_LOOK_S)
                if not await self._take(message):
                    return
        finally:
            tasks = [beat, *self._streams.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _take(self, message: ToEngine) -> bool:
        """Act on a message; False for the last one."""
        match message:
            case Submit():
                request = message.request
                task = asyncio.create_task(self._stream(request))
                self._streams[request.request_id] = task
                task.add_done_callback(lambda done: self._streams.pop(request.request_id, None))
            case Abort():
                await self._controller.abort([self._prefix + request_id for request_id in message.request_ids])
            case StatsQuery():
                await self._channel.send(await self._stats())
            case Drain():
                if self._streams:
                    await asyncio.wait(self._streams.values(), timeout=message.timeout_s)
                await self._channel.send(Drained(unfinished=sorted(self._streams)))
            case Shutdown():
                return False
            case Enter() | Renew():
                pass
        return True

    async def _stream(self, request: Request) -> None:
        """Pass a request on and its deltas back."""
        inner = msgspec.structs.replace(request, request_id=self._prefix + request.request_id)
        try:
            async with aclosing(self._orphans.submit(inner, lambda: self._acknowledge(request.request_id))) as deltas:
                await self._pass_back(request.request_id, deltas)
        except ControlError:
            pass  # the reader finds the channel closed, and ends all of this front end
        except (EngineError, ValueError) as error:
            kind = "full" if isinstance(error, QueueFull) else "engine" if isinstance(error, EngineError) else "value"
            retry_s = error.retry_after_s if isinstance(error, QueueFull) else 0.0
            self._channel.post(
                Rejected(request_id=request.request_id, kind=kind, text=str(error), retry_after_s=retry_s)  # type: ignore[arg-type]
            )

    def _acknowledge(self, request_id: str) -> None:
        """The journal holds a request."""
        try:
            self._channel.post(Acknowledged(request_ids=[request_id]))
        except ControlError:
            pass  # the reader finds the channel closed, and ends all of this front end

    async def _pass_back(self, request_id: str, deltas: AsyncIterator[OutputDelta]) -> None:
        async for delta in deltas:
            await self._channel.send(Outputs(deltas=[msgspec.structs.replace(delta, request_id=request_id)]))

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_INTERVAL_S)
            try:
                self._channel.post(Beat(busy=bool(self._streams)))
            except ControlError:
                return

    async def _stats(self) -> EngineStats:
        """Of all replicas together."""
        try:
            return sum_stats(await self._controller.stats())
        except EngineError:
            return EngineStats()


def sum_stats(parts: list[EngineStats]) -> EngineStats:
    """Counters and gauges added up; blocks per cache group."""
    total = msgspec.to_builtins(EngineStats())
    for part in parts:
        for name, value in msgspec.to_builtins(part).items():
            if isinstance(value, list):
                old = total[name] or [0] * len(value)
                total[name] = [left + right for left, right in zip(old, value, strict=True)]
            elif isinstance(value, int | float):
                total[name] += value
    return msgspec.convert(total, EngineStats)
