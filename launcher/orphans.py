"""Orphans: requests that a journal kept for clients that have not come back yet; they run on meanwhile.

orphans = Orphans(controller, journal, grace_s=60)
orphans.start()                                        # a new controller, its replicas ready or about to be
async for delta in orphans.attach("request-1", 17): ...    # a client that has the first 17 tokens
"""

import asyncio
from collections.abc import AsyncIterator

from shoal.engine.client import EngineClient, EngineError
from shoal.engine.messages import OutputDelta
from shoal.launcher.journal import Journal, Kept


class _Orphan:
    """A request under way without a client: its deltas are kept, at most max_tokens of them."""

    def __init__(self, kept: Kept) -> None:
        self.request = kept.resumed()
        self.before = Kept(kept.request, list(kept.token_ids), list(kept.logprobs))
        self.deltas: list[OutputDelta] = []
        self.arrived = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self.attached = False


class Orphans:
    """Used from one event loop, the controller's."""

    def __init__(self, client: EngineClient, journal: Journal, grace_s: float) -> None:
        """grace_s: after which a request nobody came back for is aborted."""
        self._client, self._grace_s = client, grace_s
        self._orphans = {request_id: _Orphan(kept) for request_id, kept in journal.live.items()}

    @property
    def waiting(self) -> list[str]:
        """Ids nobody has attached to yet."""
        return sorted(request_id for request_id, orphan in self._orphans.items() if not orphan.attached)

    def start(self) -> None:
        """Have all of them go on."""
        for orphan in self._orphans.values():
            orphan.task = asyncio.get_running_loop().create_task(self._run(orphan))
        asyncio.get_running_loop().call_later(self._grace_s, self._give_up)

    async def _run(self, orphan: _Orphan) -> None:
        try:
            async for delta in self._client.submit(orphan.request):
                orphan.deltas.append(delta)
                orphan.arrived.set()
        except (ValueError, EngineError) as error:
            orphan.deltas.append(
                OutputDelta(
                    request_id=orphan.request.request_id,
                    start=len(orphan.request.emitted_token_ids),
                    token_ids=[],
                    finish_reason="error",
                    error=str(error),
                )
            )
            orphan.arrived.set()

    def _give_up(self) -> None:
        for request_id in self.waiting:
            orphan = self._orphans.pop(request_id)
            if orphan.task is not None:
                orphan.task.cancel()  # closes its stream, which aborts it

    async def attach(self, request_id: str, position: int) -> AsyncIterator[OutputDelta]:
        """The request's deltas from absolute output position `position` on, to its end. Raises EngineError when it is
        not kept, was attached to before, or had not come so far.
        """
        orphan = self._orphans.get(request_id)
        if orphan is None or orphan.attached:
            raise EngineError(f"request {request_id!r} is not kept here: it ended, was given up, or has its client")
        before = orphan.before
        if not 0 <= position <= len(before.token_ids):
            raise EngineError(f"request {request_id!r} has emitted {len(before.token_ids)} tokens, not {position}")
        orphan.attached = True
        try:
            if position < len(before.token_ids):
                first = len(before.token_ids) - len(before.logprobs)
                logprobs = before.logprobs[max(0, position - first) :] if position >= first else None
                yield OutputDelta(
                    request_id=request_id,
                    start=position,
                    token_ids=before.token_ids[position:],
                    logprobs=logprobs or None,
                )
            taken = 0
            while True:
                while taken < len(orphan.deltas):
                    delta = orphan.deltas[taken]
                    taken += 1
                    yield delta
                    if delta.finish_reason is not None:
                        return
                orphan.arrived.clear()
                await orphan.arrived.wait()
        finally:
            self._orphans.pop(request_id, None)
            if orphan.task is not None:
                orphan.task.cancel()

    async def close(self) -> None:
        """End what still runs for nobody. Idempotent."""
        tasks = [orphan.task for orphan in self._orphans.values() if orphan.task is not None]
        self._orphans.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
