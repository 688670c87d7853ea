"""EngineClient: what a front end talks to; a replica in this process, one behind a socket, and the router implement
it."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator

from shoal.engine.messages import EngineStats, OutputDelta, Request


class EngineError(RuntimeError):
    """The engine ended or refused; the text names rank and cause."""


class QueueFull(EngineError):
    """The waiting queue is at scheduler.max_queued_requests; retry_after_s says when to come back."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class EngineClient(ABC):
    """A stream of deltas for every accepted request, always ended by a finish_reason or an error, never by silence.

    All methods are coroutines or async iterators to be used from one asyncio event loop.
    """

    @abstractmethod
    def submit(self, request: Request) -> AsyncIterator[OutputDelta]:
        """Accept a request and stream its deltas. Raises ValueError (bad request), QueueFull or EngineError on the
        first iteration.

        Closing the iterator early aborts the request.
        """

    @abstractmethod
    async def abort(self, request_ids: list[str]) -> None:
        """End requests; unknown or finished ids are no error."""

    @abstractmethod
    async def stats(self) -> list[EngineStats]:
        """One entry per replica."""

    @abstractmethod
    async def health(self) -> None:
        """Raises EngineError with the first cause when the engine cannot serve."""

    @abstractmethod
    async def drain(self, timeout_s: float) -> list[str]:
        """Refuse new requests, wait for the running ones; returns the ids that did not finish in time."""

    @abstractmethod
    async def close(self) -> None:
        """Stop the engine and its ranks. Idempotent."""
