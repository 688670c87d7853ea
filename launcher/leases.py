"""Leases: what a front end that may vanish without a word holds on a controller; its requests end when it does.

    lease = Lease(controller, "front end 1", lease_s=1.0)
    async for delta in lease.submit(request): ...      # and, at least every lease_s, from wherever it lives:
    lease.renew()

A front end in the controller's own process needs none: it cannot vanish alone. One that hangs up is closed at once by
whoever keeps its connection; the lease is for one that is stopped, cut off, or gone with its host.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import cast

from shoal.engine.client import EngineClient, EngineError
from shoal.engine.messages import EngineStats, OutputDelta, Request


class Lease(EngineClient):
    """A front end's view of a controller, good for lease_s after each `renew`. One event loop.

    When it runs out, or is closed, its requests are aborted at their replicas, which frees their blocks within a step.
    """

    def __init__(self, client: EngineClient, name: str, lease_s: float) -> None:
        self.name, self.lease_s = name, lease_s
        self._client = client
        self._requests: set[str] = set()
        self._ended: str | None = None
        self._ending: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(lease_s, self._run_out)
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def live(self) -> bool:
        """Whether it holds."""
        return self._ended is None

    def renew(self) -> None:
        """The front end lives. Raises EngineError when it is too late."""
        self._check()
        self._timer.cancel()
        self._timer = self._loop.call_later(self.lease_s, self._run_out)

    def _check(self) -> None:
        if self._ended is not None:
            raise EngineError(f"the lease of {self.name} {self._ended}; open another")

    def _run_out(self) -> None:
        self._end(f"ran out: it was not renewed for {self.lease_s:g} s")

    def _end(self, how: str) -> None:
        if self._ended is None:
            self._ended = how
            self._timer.cancel()
            self._ending = self._loop.create_task(self._client.abort(sorted(self._requests)))

    async def submit(self, request: Request) -> AsyncIterator[OutputDelta]:
        """See EngineClient; the stream ends with finish_reason "abort" when the lease does."""
        self._check()
        if self._draining:
            raise EngineError(f"{self.name} is draining and sends no new requests")
        if request.request_id in self._requests:
            raise ValueError(f"request_id {request.request_id!r} is already in use: wait for its end or choose another")
        self._requests.add(request.request_id)
        self._idle.clear()
        try:
            async with aclosing(cast(AsyncGenerator[OutputDelta], self._client.submit(request))) as stream:
                async for delta in stream:
                    yield delta
        finally:
            self._requests.discard(request.request_id)
            if not self._requests:
                self._idle.set()

    async def abort(self, request_ids: list[str]) -> None:
        """End requests of this lease; others are left alone."""
        await self._client.abort([request_id for request_id in request_ids if request_id in self._requests])

    async def stats(self) -> list[EngineStats]:
        """The controller's."""
        return await self._client.stats()

    async def health(self) -> None:
        """Raises EngineError when the lease has ended, or the engine cannot serve."""
        self._check()
        await self._client.health()

    async def drain(self, timeout_s: float) -> list[str]:
        """Take no new requests here, wait for the running ones; returns the ids that did not finish in time."""
        self._draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            pass
        return sorted(self._requests)

    async def close(self) -> None:
        """End the lease and its requests; the engine goes on. Idempotent."""
        self._end("was closed")
        if self._ending is not None:
            await self._ending
