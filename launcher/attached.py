"""AttachedReplica: a controller in another process as a front end's own controller sees it: one big replica.

When that controller dies, the handle's life ends; the next life connects to the restarted one under the same id, and
the front end's requests, which go on there already, are joined at the tokens it holds.
"""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable

import msgspec

from shoal.engine.client import EngineError
from shoal.engine.messages import Message
from shoal.launcher.replica import Progress, ReplicaHandle
from shoal.launcher.replica_client import ReplicaClient
from shoal.launcher.replica_messages import FROM_ENGINE, Enter, FromEngine, Ready, Renew, Starting
from shoal.parallel.control import Channel, ControlError
from shoal.parallel.control_async import AsyncChannel
from shoal.parallel.control_connect import connect

CONNECT_TIMEOUT_S = 10.0
READY_TIMEOUT_S = 10.0
RETRY_S = 0.25
RENEWALS = 5  # in the time of a lease
CLOSE_TIMEOUT_S = 2.0


class Door(Message, frozen=True, kw_only=True):
    """Where a controller takes front ends. checkpoint: digest of the checkpoint it runs. lease_s: a front end that is
    not heard for so long loses what it asked for.
    """

    address: str
    key: bytes
    vocab_size: int
    max_model_len: int
    checkpoint: str
    lease_s: float


class NotYet(Message, frozen=True, kw_only=True):
    """The controller is starting. doing: what."""

    doing: str


AskDoor = Callable[[], Awaitable[Door | NotYet]]
"""Raises EngineError while the controller cannot be reached, ValueError when there is none and will be none."""


def new_front_end() -> str:
    """An id that no other front end has."""
    return secrets.token_hex(16)


class AttachedReplica(ReplicaHandle):
    """One connection to a controller."""

    client: ReplicaClient

    def __init__(self, ask: AskDoor, silence_s: float, name: str, front_end: str) -> None:
        """silence_s: after which the controller counts as hung. name: how errors call it. front_end: who connects, the
        same for all lives, so that the controller knows its requests again (`new_front_end`).
        """
        self._ask, self._silence_s, self._name, self._front_end = ask, silence_s, name, front_end
        self._channel: AsyncChannel[FromEngine] | None = None
        self._client: ReplicaClient | None = None
        self._renewing: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """It runs already."""

    async def ready(self, timeout_s: float, on_progress: Progress | None = None) -> Ready:
        """Connect, as soon as it takes front ends."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                door = await self._ask()
                if isinstance(door, Door):
                    return await self._enter(door)
                waiting = door.doing
            except (ControlError, EngineError) as error:
                waiting = str(error)
            if time.monotonic() >= deadline:
                raise EngineError(f"{self._name} took no front end within {timeout_s:g} s: {waiting}")
            if on_progress is not None:
                on_progress(Starting(doing=f"waiting for {self._name}: {waiting.partition(chr(10))[0]}"))
            await asyncio.sleep(RETRY_S)

    async def _enter(self, door: Door) -> Ready:
        channel: Channel[FromEngine] = await asyncio.to_thread(
            connect, door.address, door.key, FROM_ENGINE, self._name, CONNECT_TIMEOUT_S
        )
        self._channel = await AsyncChannel.adopt(channel)
        self._channel.post(Enter(front_end=self._front_end))
        ready = await self._channel.receive(READY_TIMEOUT_S)
        if not isinstance(ready, Ready):
            raise EngineError(f"{self._name} sent a {type(ready).__name__} instead of Ready")
        self.client = self._client = ReplicaClient(
            self._channel, where=f"{self._name}: ", silence_s=self._silence_s, explain=self._explain, stop=self.stop
        )
        self._renewing = asyncio.create_task(self._renew(self._channel, door.lease_s / RENEWALS))
        return ready

    @staticmethod
    async def _renew(channel: "AsyncChannel[FromEngine]", interval_s: float) -> None:
        """Let the controller know that this front end lives, as long as there is a connection."""
        while channel.error is None:
            channel.post(Renew())
            await asyncio.sleep(interval_s)

    @staticmethod
    async def _explain() -> str:
        """Nothing is known here."""
        return ""

    async def failed(self) -> EngineError:
        """From the controller's silence or hangup."""
        assert self._client is not None, "it was ready"
        return await self._client.failed()

    def watch_accepted(self, on_accepted: Callable[[str], None]) -> None:
        """From the controller's messages."""
        assert self._client is not None, "it was ready"
        self._client.on_accepted = on_accepted

    async def stop(self) -> None:
        """Leave; the controller goes on."""
        if self._renewing is not None:
            self._renewing.cancel()
            await asyncio.gather(self._renewing, return_exceptions=True)
        if self._client is not None:
            await self._client.shut_down(CLOSE_TIMEOUT_S)
        if self._channel is not None:
            self._channel.close()


DOOR_ANSWER: "msgspec.msgpack.Decoder[Door | NotYet]" = msgspec.msgpack.Decoder(Door | NotYet)
