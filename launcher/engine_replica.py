"""EngineReplica: the handle of a replica whose engine is a process of its own, whoever starts it.

The front end listens, the engine connects; ranks are the engine's to start or to wait for.
"""

import asyncio
import logging
import platform
import time
from abc import abstractmethod
from collections.abc import Callable

from shoal.engine.cache_log import CacheChanges
from shoal.engine.client import EngineError
from shoal.engine.messages import Failure
from shoal.engine.rank_watch import patience_s
from shoal.launcher.bootstrap import EngineBootstrap
from shoal.launcher.processes import signal_ours
from shoal.launcher.replica import Progress, RankPlace, ReplicaHandle
from shoal.launcher.replica_client import ReplicaClient, failure_text
from shoal.launcher.replica_messages import (
    FROM_ENGINE,
    Beat,
    FromEngine,
    Listening,
    LogText,
    ProcessPlace,
    RankHealth,
    Ready,
    Refused,
    Starting,
)
from shoal.parallel.control import Channel, ControlError, ControlTimeout
from shoal.parallel.control_async import AsyncChannel
from shoal.parallel.control_connect import HANDSHAKE_TIMEOUT_S, Listener

ACCEPT_SLICE_S = 0.2
START_SLACK_S = 12.0  # an engine that comes late, and the wait for stacks of ranks that are missing
STOP_SLACK_S = 1.0

logger = logging.getLogger("shoal")


class EngineReplica(ReplicaHandle):
    """Subclasses start the engine and know how it ended."""

    def __init__(
        self,
        listener: Listener,
        bootstrap: EngineBootstrap,
        *,
        where: str = "",
        on_listening: Callable[[str], None] | None = None,
    ) -> None:
        """listener: at bootstrap.front_address. where: put before errors ("replica 1: ", or nothing). on_listening:
        told where the engine waits for its ranks.
        """
        self._listener, self.bootstrap, self._where = listener, bootstrap, where
        self._on_listening = on_listening
        self._channel: AsyncChannel[FromEngine] | None = None
        self._client: ReplicaClient | None = None
        self._ready: Ready | None = None

    @abstractmethod
    def how_ended(self) -> str | None:
        """How the engine process ended, with its last words; None while it runs or when nothing can be known."""

    @abstractmethod
    async def explain(self) -> str:
        """The same, given a moment to be told; empty when nothing is known."""

    async def ready(self, timeout_s: float, on_progress: Progress | None = None) -> Ready:
        """Wait until the engine takes requests. It keeps the limit itself and says more; here is some slack."""
        deadline = time.monotonic() + timeout_s + START_SLACK_S
        try:
            self._channel = await self._accept(deadline)
            ready = self._ready = await self._follow_start(self._channel, deadline, on_progress)
        except ControlTimeout:
            raise EngineError(f"{self._where}the start took longer than {timeout_s:g} s") from None
        except ControlError as error:
            raise EngineError(self._where + (await self.explain() or str(error))) from None
        self.client = self._client = ReplicaClient(
            self._channel,
            where=self._where,
            silence_s=patience_s(self.bootstrap.model.config.launcher.hang_timeout_s),
            explain=self.explain,
            stop=self.stop,
        )
        return ready

    async def failed(self) -> EngineError:
        """From the engine's last word, or its silence."""
        assert self._client is not None, "it was ready"
        return await self._client.failed()

    def watch_cache(self, on_cache: Callable[[CacheChanges], None]) -> None:
        """From the engine's messages."""
        assert self._client is not None, "it was ready"
        self._client.on_cache = on_cache

    def watch_accepted(self, on_accepted: Callable[[str], None]) -> None:
        """From the engine's messages."""
        assert self._client is not None, "it was ready"
        self._client.on_accepted = on_accepted

    def rank_health(self) -> list[RankHealth]:
        """From the engine's last beat."""
        return [] if self._client is None else self._client.beat.ranks

    def places(self) -> list[RankPlace]:
        """Layers from the shards; hosts and processes as the ranks named them."""
        processes = [] if self._ready is None else self._ready.ranks
        return [
            RankPlace(
                rank=rank,
                host=process.host,
                pid=process.pid,
                device=self.bootstrap.devices.get(rank, self.bootstrap.model.config.runtime.device),
                layers=(shard.first_layer, shard.last_layer),
            )
            for rank, (shard, process) in enumerate(zip(self.bootstrap.shards, processes, strict=False))
        ]

    async def signal(self, rank: int | None, number: int) -> None:
        """To a process that is called as Shoal's are."""
        ready = self._ready
        if ready is None or ready.engine is None:
            raise EngineError(f"{self._where}its processes are not known")
        place = ready.engine if rank is None else ready.ranks[rank]
        if not await self._reach(rank, place, number):
            raise EngineError(f"{self._where}process {place.pid} on {place.host} is not to be reached from here")

    async def _reach(self, rank: int | None, place: ProcessPlace, number: int) -> bool:
        """Send the signal, to this host's processes; False for others, and for one that has ended."""
        return place.host == platform.node() and signal_ours(place.pid, number)

    async def stop(self) -> None:
        """Ask the engine to end its ranks and itself, and wait for it a little."""
        if self._client is not None:
            await self._client.shut_down(self.bootstrap.model.config.launcher.stop_timeout_s + STOP_SLACK_S)
        self._listener.close()
        if self._channel is not None:
            self._channel.close()

    async def _accept(self, deadline: float) -> "AsyncChannel[FromEngine]":
        """Wait for the engine to connect."""
        while time.monotonic() < deadline:
            try:
                channel: Channel[FromEngine] = await asyncio.to_thread(
                    self._listener.accept,
                    self.bootstrap.key,
                    FROM_ENGINE,
                    "the engine",
                    ACCEPT_SLICE_S,
                    HANDSHAKE_TIMEOUT_S,  # on a busy host the engine may be slow to prove itself
                )
            except ControlTimeout:
                if (how := self.how_ended()) is not None:
                    raise EngineError(self._where + how) from None
                continue
            self._listener.close()
            return await AsyncChannel.adopt(channel)
        raise EngineError(f"{self._where}the engine did not connect within launcher.start_timeout_s")

    async def _follow_start(
        self, channel: "AsyncChannel[FromEngine]", deadline: float, on_progress: Progress | None
    ) -> Ready:
        while True:
            message = await channel.receive(max(0.0, deadline - time.monotonic()))
            match message:
                case Ready():
                    return message
                case Refused():
                    raise ValueError(self._where + message.text)
                case Failure():
                    raise EngineError(failure_text(message, self._where))
                case Starting() if on_progress is not None:
                    on_progress(message)
                case Listening() if self._on_listening is not None:
                    self._on_listening(message.address)
                case LogText():
                    logger.log(message.level, "%s%s", self._where, message.text)
                case Beat() | Starting() | Listening():
                    pass
                case _:
                    raise EngineError(f"{self._where}the engine sent a {type(message).__name__} while it started")
