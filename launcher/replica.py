"""ReplicaHandle: one life of one replica as the controller sees it, whoever starts its processes."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec

from shoal.engine.cache_log import CacheChanges
from shoal.engine.client import EngineClient, EngineError
from shoal.engine.messages import OutputDelta, Request
from shoal.launcher.replica_messages import RankHealth, Ready, Starting

Progress = Callable[[Starting], None]


class RankPlace(msgspec.Struct, frozen=True, kw_only=True):
    """Where a rank runs and what it holds. device: "cpu" or "cuda:N". layers: first and last + 1."""

    rank: int
    host: str
    pid: int
    device: str
    layers: tuple[int, int]


class ReplicaHandle(ABC):
    """start -> ready -> submit ... -> drain -> stop. All are coroutines of one event loop.

    A handle lives once: whatever it becomes after `failed`, the controller stops it and asks its factory for another.
    client: the replica's EngineClient; there once `ready` has returned.
    """

    client: EngineClient

    @abstractmethod
    async def start(self) -> None:
        """Have the replica's processes started; returns before they are ready. Raises EngineError."""

    @abstractmethod
    async def ready(self, timeout_s: float, on_progress: Progress | None = None) -> Ready:
        """Wait until it takes requests. Raises ValueError (settings or checkpoint forbid it), EngineError."""

    @abstractmethod
    async def failed(self) -> EngineError:
        """Wait until the replica cannot serve any more; the first cause. To be called once it was ready."""

    @abstractmethod
    async def stop(self) -> None:
        """End all its processes within launcher.stop_timeout_s and a little. Idempotent, at any time after `start`."""

    def watch_cache(self, on_cache: Callable[[CacheChanges], None]) -> None:
        """Have somebody told what its prefix cache gains and loses, once it was ready. Not every kind tells."""
        return

    def watch_accepted(self, on_accepted: Callable[[str], None]) -> None:
        """Have somebody told which requests it has accepted before it gives their first token, once it was ready. Not
        every kind tells.
        """
        return

    def places(self) -> list[RankPlace]:
        """Where its ranks run, as far as it is known."""
        return []

    def rank_health(self) -> list[RankHealth]:
        """What each rank said last of what it is doing; empty when nothing is known."""
        return []

    async def signal(self, rank: int | None, number: int) -> None:
        """Send a signal to the process of a rank (None: the engine's), for fault drills. Raises EngineError when it is
        not there, or not to be reached from here.
        """
        raise EngineError("this kind of replica has no processes that a drill could send signals to")

    async def health(self) -> None:
        """Raises EngineError with the first cause when it cannot serve."""
        await self.client.health()

    def submit(self, request: Request) -> AsyncIterator[OutputDelta]:
        """See EngineClient."""
        return self.client.submit(request)

    async def drain(self, timeout_s: float) -> list[str]:
        """See EngineClient."""
        return await self.client.drain(timeout_s)


ReplicaFactory = Callable[[int], Awaitable[ReplicaHandle]]
"""Makes a fresh handle for replica `number`, not started, for each of its lives. Raises ValueError, EngineError."""
