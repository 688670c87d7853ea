"""Orphans: requests an earlier life of a detached controller had accepted; they go on before their clients are back.

orphans = Orphans(controller, journal)
orphans.start(grace_s=30)                         # the journal's live requests go on
async for delta in orphans.submit(request): ...   # of a client: its orphan if there is one, else a new request
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import cast

from shoal.engine.client import EngineClient, EngineError
from shoal.engine.messages import OutputDelta, Request
from shoal.launcher.controller import Controller
from shoal.launcher.journal import Journal, Kept

logger = logging.getLogger("shoal")


class _Orphan:
    """A request under way without a client: its deltas are kept, at most max_tokens of them."""

    def __init__(self, kept: Kept, client: EngineClient) -> None:
        self._before = Kept(kept.request, list(kept.token_ids), list(kept.logprobs))
        self._deltas: list[OutputDelta] = []
        self._arrived = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run(kept.resumed(), client))

    async def _run(self, request: Request, client: EngineClient) -> None:
        try:
            async with aclosing(cast(AsyncGenerator[OutputDelta], client.submit(request))) as stream:
                async for delta in stream:
                    self._take(delta)
        except (ValueError, EngineError) as error:
            self._take(
                OutputDelta(
                    request_id=request.request_id,
                    start=len(request.emitted_token_ids),
                    token_ids=[],
                    finish_reason="error",
                    error=str(error),
                )
            )

    def _take(self, delta: OutputDelta) -> None:
        self._deltas.append(delta)
        self._arrived.set()

    def is_of(self, request: Request) -> bool:
        """Whether the client's request, with the tokens it has, is this one."""
        before, has = self._before, request.emitted_token_ids
        return request.prompt_token_ids == before.request.prompt_token_ids and has == before.token_ids[: len(has)]

    async def follow(self, position: int) -> AsyncGenerator[OutputDelta]:
        """Its deltas from absolute output position `position`, among those kept, to its end."""
        before, taken = self._before, 0
        if position < len(before.token_ids):
            first = len(before.token_ids) - len(before.logprobs)
            logprobs = before.logprobs[position - first :] if position >= first else None
            token_ids, name = before.token_ids[position:], before.request.request_id
            yield OutputDelta(request_id=name, start=position, token_ids=token_ids, logprobs=logprobs or None)
        while True:
            while taken < len(self._deltas):
                delta = self._deltas[taken]
                taken += 1
                yield delta
                if delta.finish_reason is not None:
                    return
            self._arrived.clear()
            await self._arrived.wait()

    async def end(self) -> None:
        """Abort it if it still runs; its id is free then."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


class Orphans:
    """Used from one event loop, the controller's."""

    def __init__(self, controller: Controller, journal: Journal) -> None:
        self._controller, self._journal = controller, journal
        self._orphans: dict[str, _Orphan] = {}
        self._giving_up: asyncio.Task[None] | None = None
        self._ending = asyncio.Lock()  # an id is not free before its orphan has ended

    @property
    def waiting(self) -> list[str]:
        """Ids no client has come back for yet."""
        return sorted(self._orphans)

    def start(self, grace_s: float) -> None:
        """Have the journal's live requests go on; those nobody came back for within grace_s are aborted then."""
        self._orphans = {name: _Orphan(kept, self._controller) for name, kept in self._journal.live.items()}
        if self._orphans:
            self._giving_up = asyncio.get_running_loop().create_task(self._give_up(grace_s))

    async def _give_up(self, grace_s: float) -> None:
        await asyncio.sleep(grace_s)
        if self._orphans:
            logger.warning("nobody came back for %d requests within %g s", len(self._orphans), grace_s)
        await self._end_all()

    async def _end_all(self) -> None:
        async with self._ending:
            ending, self._orphans = self._orphans, {}
            await asyncio.gather(*(orphan.end() for orphan in ending.values()))
            for name in ending:
                self._journal.ended(name)

    async def submit(
        self, request: Request, on_accepted: Callable[[], None] | None = None
    ) -> AsyncGenerator[OutputDelta]:
        """As Controller.submit; a request that goes on already is joined where its client is."""
        async with self._ending:
            orphan = self._orphans.pop(request.request_id, None)
        if orphan is not None:
            try:
                if orphan.is_of(request):
                    if on_accepted is not None:
                        on_accepted()
                    async with aclosing(orphan.follow(len(request.emitted_token_ids))) as deltas:
                        async for delta in deltas:
                            yield delta
                    return
            finally:
                await orphan.end()
        async with aclosing(cast(AsyncGenerator[OutputDelta], self._controller.submit(request, on_accepted))) as stream:
            async for delta in stream:
                yield delta

    async def close(self) -> None:
        """End what still runs for nobody. Idempotent."""
        if self._giving_up is not None:
            self._giving_up.cancel()
            await asyncio.gather(self._giving_up, return_exceptions=True)
        await self._end_all()
