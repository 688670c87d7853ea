"""ReplicaHandle: one replica of the model as the controller sees it, whoever starts its processes."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable

from shoal.engine.messages import OutputDelta, Request
from shoal.launcher.replica_client import ReplicaClient
from shoal.launcher.replica_messages import Ready, Starting

Progress = Callable[[Starting], None]


class ReplicaHandle(ABC):
    """start -> ready -> submit ... -> drain -> stop. All but `start` are coroutines of one event loop.

    client: the replica's EngineClient; there once `ready` has returned.
    """

    client: ReplicaClient

    @abstractmethod
    async def start(self) -> None:
        """Have the replica's processes started; returns before they are ready. Raises EngineError."""

    @abstractmethod
    async def ready(self, timeout_s: float, on_progress: Progress | None = None) -> Ready:
        """Wait until it takes requests. Raises ValueError (settings or checkpoint forbid it), EngineError."""

    async def health(self) -> None:
        """Raises EngineError with the first cause when it cannot serve."""
        await self.client.health()

    def submit(self, request: Request) -> AsyncIterator[OutputDelta]:
        """See EngineClient."""
        return self.client.submit(request)

    async def drain(self, timeout_s: float) -> list[str]:
        """See EngineClient."""
        return await self.client.drain(timeout_s)

    @abstractmethod
    async def stop(self) -> None:
        """End all its processes within launcher.stop_timeout_s and a little. Idempotent, at any time after `start`."""
